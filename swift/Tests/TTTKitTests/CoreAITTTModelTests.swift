import TTTFormats
import TTTReference
import XCTest

@testable import TTTCoreAI
@testable import TTTKit

#if os(Linux)
import CoreAI
import TTTTestSupport

/// The file that an app compiles against Core AI, run on the stand-in.
final class CoreAITTTModelTests: XCTestCase {
    private func bundle(_ name: String) -> URL {
        let bundle = Files.fixture("\(name).bundle")
        StandIn.shared.register(directory(name), for: bundle)
        return bundle
    }

    private func directory(_ name: String) -> URL {
        name == "mlp" ? Files.golden("mlp-mamba") : Files.bundled
    }

    /// What `source.safetensors` in the bundle would say.
    private func source(_ name: String) throws -> ModelSource {
        let metadata = try Files.json("\(name).bundle/metadata.json")
        return ModelSource(
            fingerprint: "a", modelFingerprint: metadata["user_data"]?["com.mlx-ttt.model"]?.string ?? "",
            startWeights: try ReferenceNetwork(directory: directory(name)).start.map(\.weights))
    }

    private func load(_ name: String) async throws -> CoreAITTTModel {
        try await CoreAITTTModel(bundle: bundle(name), source: source(name))
    }

    /// Logits in float16 always, the state in what the bundle says.
    func testLogitsAreNearPythons() async throws {
        for (name, bundle) in [("linear", "linear"), ("linear", "linear-half"), ("mlp", "mlp")] {
            let expected = try Files.arrays("\(name).safetensors")
            let (ids, positions) = (try expected.integers("ids"), try expected.integers("positions"))
            let model = try await load(bundle)
            XCTAssertEqual(model.info.miniBatchSize, 16)
            for (index, position) in positions.enumerated() {
                try await model.reset()
                let logits = try await Reader(model).read(Array(ids[...position]))
                let V = model.info.vocabularySize
                let values = try expected.tensor("logits").values[index * V..<(index + 1) * V]
                let largest = values.reduce(0) { max($0, abs($1)) }
                let difference = zip(logits, values).reduce(0) { max($0, abs($1.0 - $1.1)) }
                XCTAssertLessThan(difference, 6e-4 * max(1, largest), "\(bundle), position \(position)")
            }
        }
    }

    func testAStateIsSavedAndRestored() async throws {
        let ids = try Files.json("linear.json")["prompt_ids"]?.integers ?? []
        for name in ["linear", "linear-half"] {
            let model = try await load(name)
            _ = try await Reader(model).read(Array(ids[..<35]))
            let saved = try await model.state(position: 35)
            let expected = try await model.decode(ids[35], position: 3)
            try await model.reset()
            try await model.restore(saved)
            let found = try await model.decode(ids[35], position: 3)
            // Float32 differences from the start weights are rounded when those are added and taken away.
            let difference = zip(found, expected).reduce(0) { max($0, abs($1.0 - $1.1)) }
            XCTAssertLessThan(difference, name == "linear" ? 1e-2 : 1e-6, name)
        }
    }

    func testTheTextIsPythonsUpToTheNearTie() async throws {
        let generator = TTTGenerator(
            model: try await load("linear"), tokenizer: try JSONTokenizer(folder: Files.bundled))
        let expected = try Files.json("linear.json")
        var text = ""
        let options = TTTOptions(maxTokens: 32, endTokens: [])
        for try await piece in generator.generate(expected["prompt"]?.string ?? "", options: options) { text += piece }
        XCTAssertGreaterThan(text.count, 60)
        XCTAssertTrue(expected["greedy_text"]?.string?.hasPrefix(text) ?? false, text)
    }

    func testStatesAreWrittenInPlace() async throws {
        let model = try await load("linear")
        let before = StandIn.shared.copies
        for position in 0..<20 { _ = try await model.decode(5, position: position % 16) }
        XCTAssertEqual(StandIn.shared.copies, before)
    }

    func testCallsAtOnceAreRefused() async throws {
        let model = try await load("linear")
        let second = Second()
        StandIn.shared.whilePredicting {
            StandIn.shared.whilePredicting(nil)
            await second.run(model)
        }
        _ = try await model.decode(5, position: 0)
        let error = await second.error
        XCTAssertEqual(error as? TTTError, .stateLost)
        _ = try await model.decode(6, position: 1)
    }

    private actor Second {
        private(set) var error: Error?

        func run(_ model: CoreAITTTModel) async {
            do { _ = try await model.decode(5, position: 0) } catch { self.error = error }
        }
    }

    func testAFailedCallLosesTheState() async throws {
        let model = try await load("linear")
        _ = try await model.decode(5, position: 0)
        do {
            _ = try await model.decode(5, position: 0)  // of another phase than the state
            XCTFail("no error")
        } catch {
            XCTAssertTrue(error.localizedDescription.contains("at phase 0"), error.localizedDescription)
        }
        do {
            _ = try await model.state(position: 1)
            XCTFail("no error")
        } catch { XCTAssertEqual(error as? TTTError, .stateLost) }
        try await model.reset()
        _ = try await model.decode(5, position: 0)
    }

    /// `main` has neither, whatever the bundle's other functions have.
    func testTakesNoLearningScaleAndGivesNoSignals() async throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).bundle")
        try FileManager.default.copyItem(at: bundle("linear"), to: folder)
        defer { try? FileManager.default.removeItem(at: folder) }
        StandIn.shared.register(directory("linear"), for: folder)
        let file = folder.appendingPathComponent("metadata.json")
        let format = #""com.mlx-ttt.format":"#
        let more = #""com.mlx-ttt.learning": "[6, 4]", "com.mlx-ttt.signals": "[\"loss\", \"lr\", \"writeNorm\"]", "#
        let text = try String(contentsOf: file, encoding: .utf8)
        XCTAssertTrue(text.contains(format))
        try Data(text.replacingOccurrences(of: format, with: more + format).utf8).write(to: file)
        let model: any TTTModel = try await CoreAITTTModel(bundle: folder, source: source("linear"))
        XCTAssertNil(model.info.learningShape)
        XCTAssertFalse(model.info.givesSignals)
        do {
            try await model.setLearning(Tensor(zeros: [6, 4]))
            XCTFail("no error")
        } catch { XCTAssertEqual(error as? TTTError, .noLearningScale) }
        do {
            _ = try await model.signals()
            XCTFail("no error")
        } catch { XCTAssertEqual(error as? TTTError, .noSignals) }
    }

    func testWhatIsNoBundleIsRefused() async throws {
        for (folder, message) in [
            (Files.root, "metadata.json cannot be read"), (Files.fixture("small"), "metadata.json cannot be read"),
        ] {
            do {
                _ = try await CoreAITTTModel(bundle: folder, source: source("linear"))
                XCTFail("no error")
            } catch { XCTAssertTrue(error.localizedDescription.contains(message), error.localizedDescription) }
        }
        do {
            _ = try await CoreAITTTModel(bundle: bundle("linear"))
            XCTFail("no error")
        } catch { XCTAssertTrue(error.localizedDescription.contains("source.safetensors"), error.localizedDescription) }
        do {
            _ = try await CoreAITTTModel(bundle: bundle("linear"), source: source("mlp"))
            XCTFail("no error")
        } catch { XCTAssertTrue(error.localizedDescription.contains("not the model of"), error.localizedDescription) }
    }

    // MARK: - What the stand-in catches

    func testWrongNamesShapesAndTypesAreCaught() async throws {
        let model = try await AIModel(contentsOf: bundle("linear").appendingPathComponent("linear.aimodel"))
        XCTAssertNil(try model.loadFunction(named: "decode"))
        let function = try XCTUnwrap(model.loadFunction(named: "main"))
        let ids = NDArray(scalars: [Int32(5)], shape: [1, 1])
        let floats = NDArray(scalars: [Float(5)], shape: [1, 1])
        let flat = NDArray(scalars: [Int32(5)], shape: [1])
        for (message, inputs) in [
            ("has inputs", ["inputIds": ids, "position_ids": ids]), ("has inputs", ["input_ids": ids]),
            ("holds", ["input_ids": floats, "position_ids": ids]),
            ("input_ids is", ["input_ids": flat, "position_ids": ids]),
            ("has states", ["input_ids": ids, "position_ids": ids]),
        ] {
            do {
                _ = try await function.run(inputs: inputs)
                XCTFail("no error")
            } catch { XCTAssertTrue(error.localizedDescription.contains(message), error.localizedDescription) }
        }
    }
}

/// Reads tokens as the generator does: blocks, then steps.
private struct Reader {
    private let model: CoreAITTTModel

    init(_ model: CoreAITTTModel) {
        self.model = model
    }

    func read(_ ids: [Int]) async throws -> [Float] {
        var (done, logits) = (0, [Float]())
        let info = model.info
        while done < ids.count {
            let count = done % info.miniBatchSize == 0 ? min(info.prefillTokens, ids.count - done) : 1
            let padding = [Int](repeating: 0, count: info.prefillTokens - count)
            logits =
                count == 1
                ? try await model.decode(ids[done], position: done % info.miniBatchSize)
                : try await model.prefill(Array(ids[done..<done + count]) + padding, length: count)
            done += count
        }
        return logits
    }
}
#endif
