import TTTFormats
import XCTest

@testable import TTTKit

#if os(Linux)
import CoreML
import TTTTestSupport

/// The learning scale and the signals of packages that were exported with them.
final class LearningTests: XCTestCase {
    /// Float16 logits, and a state that is rounded to float16 after every call.
    private static let bound: Float = 6e-4

    func testLogitsAndSignalsAreNearPythons() async throws {
        for name in ["linear", "linear-io", "mlp"] {
            let model = try await Packages.load(Packages.url("\(name)-learning"))
            for scale in ["one", "uneven", "frozen"] {
                let expected = try LearningCase(name == "mlp" ? "mlp" : "linear", scale)
                try await model.reset()
                try await model.setLearning(expected.learning)
                let (logits, seen) = try await Packages.read(expected.ids, model)
                let wanted = try XCTUnwrap(expected.logits.last)
                let largest = wanted.reduce(0) { max($0, abs($1)) }
                let difference = zip(logits, wanted).reduce(0) { max($0, abs($1.0 - $1.1)) } / largest
                XCTAssertLessThan(difference, Self.bound, "\(name), \(scale)")
                let signals = expected.differences(seen)
                print("\(name), learning \(scale): logits differ by \(difference), signals by \(signals)")
                for (signal, difference) in signals {
                    XCTAssertLessThan(difference, Self.bound, "\(name), \(scale), \(signal)")
                }
            }
        }
    }

    /// As the package's own description says: a call that leaves the scale out is a call with ones.
    func testTheScaleIsOneWhereItIsLeftOut() async throws {
        let url = Packages.url("linear-io-learning")
        let model = try await Packages.load(url)
        let expected = try await model.decode(5, position: 0)
        let decode = try Packages.function("decode", url)
        let found = try decode.prediction(from: inputs(url))
        let logits = try XCTUnwrap(found.featureValue(for: "logits")?.multiArrayValue)
        XCTAssertEqual(MLShapedArray<Float>(converting: logits).scalars, expected)
        try await model.reset()
        try await model.setLearning(Tensor(zeros: try XCTUnwrap(model.info.learningShape)))
        let frozen = try await model.decode(5, position: 0)
        XCTAssertNotEqual(frozen, expected)
    }

    func testTheStandInTakesNoOtherScaleThanThePackageDescribes() async throws {
        let url = Packages.url("linear-io-learning")
        let decode = try Packages.function("decode", url)
        let model = try await Packages.load(url)
        let shape = try XCTUnwrap(model.info.learningShape)
        let count = shape.reduce(1, *)
        let flat = MLMultiArray(MLShapedArray<Float>(scalars: [Float](repeating: 1, count: count), shape: [count]))
        let integers = MLMultiArray(MLShapedArray<Int32>(scalars: [Int32](repeating: 1, count: count), shape: shape))
        for (what, scale) in [("learning is", flat), ("learning holds", integers)] {
            XCTAssertThrowsError(try decode.prediction(from: inputs(url, learning: scale))) { error in
                XCTAssertTrue(error.localizedDescription.contains(what), error.localizedDescription)
            }
        }
        let plain = Packages.url("linear-io")
        let right = MLMultiArray(MLShapedArray<Float>(scalars: [Float](repeating: 1, count: count), shape: shape))
        let without = try Packages.function("decode", plain)
        XCTAssertThrowsError(try without.prediction(from: inputs(plain, learning: right))) { error in
            XCTAssertTrue(error.localizedDescription.contains("takes"), error.localizedDescription)
        }
    }

    /// What `decode` of a package with the state as an input takes for a first token.
    private func inputs(_ package: URL, learning: MLMultiArray? = nil) throws -> MLDictionaryFeatureProvider {
        let description = try Packages.function("decode", package).modelDescription
        let shape = try XCTUnwrap(description.inputDescriptionsByName["tttState"]?.multiArrayConstraint?.shape)
        let state = try MLMultiArray(shape: shape, dataType: .float16)
        state.withUnsafeMutableBytes { bytes, _ in _ = bytes.initializeMemory(as: UInt8.self, repeating: 0) }
        var arrays = [
            "inputIds": MLMultiArray(MLShapedArray<Int32>(scalars: [5], shape: [1, 1])),
            "position": MLMultiArray(MLShapedArray<Int32>(scalars: [0], shape: [1])), "tttState": state,
        ]
        arrays["learning"] = learning
        return try MLDictionaryFeatureProvider(dictionary: arrays.mapValues { MLFeatureValue(multiArray: $0) })
    }

    // MARK: - The generator

    private final class Seen: @unchecked Sendable {
        private let lock = NSLock()
        private var observations: [TTTObservation] = []

        func append(_ observation: TTTObservation) { lock.withLock { observations.append(observation) } }

        var all: [TTTObservation] { lock.withLock { observations } }
    }

    /// Frozen between two calls: read, write without learning, then with it again.
    func testTheGeneratorFreezesAndObserves() async throws {
        let model = try await Packages.load(Packages.url("linear-learning"))
        let generator = TTTGenerator(model: model, tokenizer: try JSONTokenizer(folder: Files.bundled))
        let prompt = try Files.json("linear.json")
        let ids = prompt["prompt_ids"]?.integers ?? []
        let seen = Seen()
        try await generator.read(prompt["prompt"]?.string ?? "", observer: { seen.append($0) })
        XCTAssertEqual(seen.all.map(\.token), Array(ids.dropLast()))
        XCTAssertEqual(seen.all.map(\.position), Array(0..<ids.count - 1))
        XCTAssertTrue(seen.all.allSatisfy { $0.signals.learningRate.values.allSatisfy { $0 > 0 } })

        // Rows that are open are still written; with the mini-batch after them nothing changes any more.
        try await generator.setLearning(0)
        let learned = Seen()
        let K = model.info.miniBatchSize
        let options = TTTOptions(maxTokens: K, endTokens: [])
        for try await _ in generator.generate(options: options, observer: { learned.append($0) }) {}
        let before = try await generator.state()
        let twice = TTTOptions(maxTokens: 2 * K, endTokens: [])
        for try await _ in generator.generate(options: twice, observer: { learned.append($0) }) {}
        let after = try await generator.state()
        XCTAssertEqual(before.layers.map(\.weights), after.layers.map(\.weights))
        XCTAssertEqual(learned.all.map(\.position), Array(ids.count - 1..<ids.count - 1 + 3 * K))
        XCTAssertEqual(learned.all.first?.token, ids.last)
        XCTAssertTrue(learned.all.allSatisfy { $0.signals.writeNorm.values.allSatisfy { $0 == 0 } })
        XCTAssertTrue(learned.all.allSatisfy { $0.signals.loss.values.allSatisfy { $0 > 0 } })

        try await generator.setLearning(1)
        for try await _ in generator.generate(options: options) {}
        let changed = try await generator.state()
        XCTAssertNotEqual(after.layers.map(\.weights), changed.layers.map(\.weights))
    }

    func testAScaleStaysWhenTheTextIsForgotten() async throws {
        let model = try await Packages.load(Packages.url("linear-learning"))
        let generator = TTTGenerator(model: model, tokenizer: try JSONTokenizer(folder: Files.bundled))
        try await generator.setLearning(0)
        try await generator.reset()
        let seen = Seen()
        try await generator.read("To be, or not to be", observer: { seen.append($0) })
        XCTAssertTrue(seen.all.allSatisfy { $0.signals.learningRate.values.allSatisfy { $0 == 0 } })
        XCTAssertFalse(seen.all.isEmpty)
    }

    // MARK: - What is refused

    private func assertThrows(_ error: TTTError, line: UInt = #line, _ body: () async throws -> Void) async {
        do {
            try await body()
            XCTFail("no error", line: line)
        } catch let found {
            XCTAssertEqual(found as? TTTError, error, line: line)
        }
    }

    func testAPackageWithoutThemIsRefusedBeforeAnythingIsRead() async throws {
        let model = try await Packages.load(Packages.url("linear"))
        XCTAssertNil(model.info.learningShape)
        XCTAssertFalse(model.info.givesSignals)
        let generator = TTTGenerator(model: model, tokenizer: try JSONTokenizer(folder: Files.bundled))
        await assertThrows(.noLearningScale) { try await model.setLearning(Tensor(zeros: [1, 1])) }
        await assertThrows(.noSignals) { _ = try await model.signals() }
        await assertThrows(.noLearningScale) { try await generator.setLearning(0) }
        await assertThrows(.noLearningScale) { try await generator.setLearning(Tensor(zeros: [1, 1])) }
        await assertThrows(.noSignals) { try await generator.read("To be", observer: { _ in }) }
        await assertThrows(.noSignals) { for try await _ in generator.generate("To be", observer: { _ in }) {} }
        let position = await generator.position
        XCTAssertEqual(position, 0)
        XCTAssertEqual(
            TTTError.noLearningScale.localizedDescription,
            "This model takes no learning scale; export it for Core ML with `convert.py coreml --learning`.")
        XCTAssertEqual(
            TTTError.noSignals.localizedDescription,
            "This model gives no signals; export it for Core ML with `convert.py coreml --signals`.")
    }

    func testAScaleOfOtherHeadsThanTheStatesIsRefused() async throws {
        let url = FileManager.default.temporaryDirectory.appendingPathComponent("linear-\(UUID().uuidString).mlpackage")
        try FileManager.default.copyItem(at: Packages.url("linear-learning"), to: url)
        defer { try? FileManager.default.removeItem(at: url) }
        StandIn.shared.register(Files.bundled, for: url)
        let file = url.appendingPathComponent("Data/com.apple.CoreML/model.mlmodel")
        var content = try Data(contentsOf: file)
        let key = try XCTUnwrap(content.range(of: Data("com.mlx-ttt.learning".utf8)))
        let shape = try XCTUnwrap(content.range(of: Data("[4, 4]".utf8), in: key.upperBound..<content.endIndex))
        content.replaceSubrange(shape, with: Data("[4, 5]".utf8))
        try content.write(to: file)
        await assertThrows(.notATTTPackage("its learning scale is not of the layers and heads of its state")) {
            _ = try await Packages.load(url)
        }
    }

    func testScalesThatAreNoneAreRefused() async throws {
        let model = try await Packages.load(Packages.url("linear-learning"))
        let generator = TTTGenerator(model: model, tokenizer: try JSONTokenizer(folder: Files.bundled))
        let shape = try XCTUnwrap(model.info.learningShape)
        await assertThrows(
            .invalidOption("The learning scale is [\(shape[1]), \(shape[0] + 1)], the model takes \(shape)")
        ) {
            try await generator.setLearning(Tensor(zeros: [shape[1], shape[0] + 1]))
        }
        for wrong in [-1, Float.infinity, .nan] {
            await assertThrows(
                .invalidOption("The learning scale has \(wrong), expected finite numbers from 0 on")
            ) { try await generator.setLearning(wrong) }
        }
    }
}
#endif
