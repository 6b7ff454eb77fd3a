import TTTFormats
import TTTReference
import XCTest

@testable import TTTKit

#if os(Linux)
import CoreML
import TTTTestSupport

/// The packages among the fixtures, on the stand-in of Core ML.
enum Packages {
    /// The model directory that a package was exported from.
    static func source(_ name: String) -> URL {
        name.hasPrefix("mlp") ? Files.golden("mlp-mamba") : Files.bundled
    }

    static func url(_ name: String) -> URL {
        let package = Files.fixture("\(name).mlpackage")
        StandIn.shared.register(source(name), for: package)
        return package
    }

    static func function(_ name: String, _ package: URL) throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.functionName = name
        return try MLModel(contentsOf: package, configuration: configuration)
    }

    static func load(_ package: URL) async throws -> CoreMLTTTModel {
        let description = try function("decode", package).modelDescription
        let metadata = description.metadata[.creatorDefinedKey] as? [String: String]
        let directory = source(package.lastPathComponent)
        let source = ModelSource(  // what `source.safetensors` beside the package would say
            fingerprint: try Files.json("linear.json")["fingerprint"]?.string ?? "",
            modelFingerprint: metadata?["com.mlx-ttt.model"] ?? "",
            startWeights: try ReferenceNetwork(directory: directory).start.map(\.weights))
        return try await CoreMLTTTModel.load(contentsOf: package, source: source)
    }

    /// Reads tokens as the generator does: blocks, then steps. The signals are empty if the package gives none.
    static func read(
        _ ids: [Int], _ model: CoreMLTTTModel, from start: Int = 0
    ) async throws -> (logits: [Float], signals: [TTTSignals]) {
        var (done, logits, signals) = (0, [Float](), [TTTSignals]())
        let info = model.info
        while done < ids.count {
            let phase = (start + done) % info.miniBatchSize
            let count = phase == 0 ? min(info.prefillTokens, ids.count - done) : 1
            if count == 1 {
                logits = try await model.decode(ids[done], position: phase)
            } else {
                let block = Array(ids[done..<done + count])
                let padding = [Int](repeating: 0, count: info.prefillTokens - count)
                logits = try await model.prefill(block + padding, length: count)
            }
            if info.givesSignals { signals += try await model.signals() }
            done += count
        }
        return (logits, signals)
    }
}
#endif
