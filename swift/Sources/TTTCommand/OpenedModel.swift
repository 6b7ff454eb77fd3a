import Foundation
import TTTFormats
import TTTKit

/// What runs behind `--model DIR`: a package and its companions in Core ML, or a model directory on the reference
/// network.
struct OpenedModel {
    let model: any TTTModel
    let tokenizer: JSONTokenizer
    /// What a person should know of it.
    let remark: String

    init(_ directory: URL) async throws {
        tokenizer = try JSONTokenizer(folder: directory)
        #if !os(Linux)
            if let package = Self.package(in: directory) {
                let source = try ModelSource(contentsOf: directory.appendingPathComponent("source.safetensors"))
                model = try await CoreMLTTTModel.load(contentsOf: package, source: source)
                remark = "Core ML runs \(package.lastPathComponent)\n"
                return
            }
        #endif
        model = try ReferenceTTTModel(directory: directory, vocabulary: tokenizer.vocabulary)
        remark = "the reference network runs \(directory.lastPathComponent): this is slow\n"
    }

    /// The compiled package in a folder.
    private static func package(in directory: URL) -> URL? {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: directory.path)) ?? []
        return names.first { $0.hasSuffix(".mlmodelc") }.map { directory.appendingPathComponent($0) }
    }
}
