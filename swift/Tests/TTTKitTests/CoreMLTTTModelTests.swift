import TTTFormats
import TTTReference
import XCTest

@testable import TTTKit

#if os(Linux)
import CoreML
import TTTTestSupport

/// The files that an app compiles against Core ML, run on the stand-in.
final class CoreMLTTTModelTests: XCTestCase {
    private func load(_ package: URL) async throws -> CoreMLTTTModel {
        try await Packages.load(package)
    }

    private var linear: URL { Packages.url("linear") }
    private var linearIO: URL { Packages.url("linear-io") }
    private var mlp: URL { Packages.url("mlp") }

    private func read(_ ids: [Int], _ model: CoreMLTTTModel, from start: Int = 0) async throws -> [Float] {
        try await Packages.read(ids, model, from: start).logits
    }

    /// Float16 logits, and a state that is rounded to float16 after every call.
    func testLogitsAreNearPythons() async throws {
        for (name, url) in [("linear", linear), ("linear", linearIO), ("mlp", mlp)] {
            let expected = try Files.arrays("\(name).safetensors")
            let (ids, positions) = (try expected.integers("ids"), try expected.integers("positions"))
            let model = try await load(url)
            let V = model.info.vocabularySize
            for (index, position) in positions.enumerated() {
                try await model.reset()
                let logits = try await read(Array(ids[...position]), model)
                let values = try expected.tensor("logits").values[index * V..<(index + 1) * V]
                let largest = values.reduce(0) { max($0, abs($1)) }
                let difference = zip(logits, values).reduce(0) { max($0, abs($1.0 - $1.1)) }
                // Half a unit in the last place of the logits, and the state's rounding.
                XCTAssertLessThan(difference, 6e-4 * max(1, largest), "\(name), position \(position)")
            }
        }
    }

    func testAStateIsSavedAndRestored() async throws {
        let ids = try Files.json("linear.json")["prompt_ids"]?.integers ?? []
        for url in [linear, linearIO] {
            let model = try await load(url)
            _ = try await read(Array(ids[..<35]), model)
            let saved = try await model.state(position: 3)
            let expected = try await model.decode(ids[35], position: 3)
            try await model.reset()
            try await model.restore(saved)
            let found = try await model.decode(ids[35], position: 3)
            XCTAssertEqual(found, expected)
        }
    }

    /// Two logits may change places if they are as near as this, as a share of the largest: half a unit in the last
    /// place of float16, and the state's rounding.
    private static let nearTie: Float = 6e-4

    /// At all 300 places of Python's likeliest text the likeliest is Python's, unless Python's two best are a near tie.
    func testTheLikeliestTokenIsPythonsExceptAtNearTies() async throws {
        for (name, url, nearTies) in [("linear", linear, [32]), ("mlp", mlp, [])] {
            let expected = try Files.json("\(name).json")
            let (prompt, greedy) = (expected["prompt_ids"]?.integers ?? [], expected["greedy_ids"]?.integers ?? [])
            let best = (expected["best_logits"]?.array ?? []).map { pair in
                (pair.array ?? []).compactMap(\.number).map { Float($0) }
            }
            XCTAssertEqual([greedy.count, best.count], [300, 300])
            let model = try await load(url)
            var logits = try await read(prompt, model)
            var parted: [Int] = []
            for (place, token) in greedy.enumerated() {
                if logits.indices.max(by: { (logits[$0], $1) < (logits[$1], $0) }) != token {
                    parted.append(place)
                    let largest = logits.reduce(0) { max($0, abs($1)) }
                    let gap = best[place][0] - best[place][1]
                    XCTAssertLessThan(gap, Self.nearTie * largest, "\(name), token \(place)")
                }
                let position = (prompt.count + place) % model.info.miniBatchSize
                logits = try await model.decode(token, position: position)
            }
            XCTAssertEqual(parted, nearTies, name)
        }
    }

    /// From the package to text: tokenizer, blocks, steps, sampler, stream.
    func testTheTextIsPythonsUpToTheNearTie() async throws {
        let expected = try Files.json("linear.json")
        let tokenizer = try JSONTokenizer(folder: Files.bundled)
        let generator = TTTGenerator(model: try await load(linear), tokenizer: tokenizer)
        var text = ""
        let options = TTTOptions(maxTokens: 32, endTokens: [])
        for try await piece in generator.generate(expected["prompt"]?.string ?? "", options: options) { text += piece }
        XCTAssertGreaterThan(text.count, 60)
        XCTAssertTrue(expected["greedy_text"]?.string?.hasPrefix(text) ?? false, text)
    }

    /// The prompt's function is loaded again when it is needed.
    func testGoesOnAfterMemoryWasGivenBack() async throws {
        let ids = try Files.json("linear.json")["prompt_ids"]?.integers ?? []
        for url in [linear, linearIO] {
            let model = try await load(url)
            _ = try await read(Array(ids[..<32]), model)
            await model.giveBackMemory()
            let loaded = StandIn.shared.loadedFunctions
            let found = try await read(Array(ids[32..<40]), model, from: 32)
            XCTAssertEqual(StandIn.shared.loadedFunctions, loaded + 1)
            try await model.reset()
            let expected = try await read(Array(ids[..<40]), model)
            XCTAssertEqual(found, expected)
        }
    }

    // MARK: - What the stand-in catches

    private func load(_ function: String, _ url: URL) throws -> MLModel {
        try Packages.function(function, url)
    }

    private func integers(_ scalars: [Int32], _ shape: [Int]) -> MLMultiArray {
        MLMultiArray(MLShapedArray<Int32>(scalars: scalars, shape: shape))
    }

    private func inputs(_ arrays: [String: MLMultiArray]) throws -> MLDictionaryFeatureProvider {
        try MLDictionaryFeatureProvider(dictionary: arrays.mapValues { MLFeatureValue(multiArray: $0) })
    }

    private func assertRefuses(_ what: String, line: UInt = #line, _ body: () throws -> Void) {
        XCTAssertThrowsError(try body(), line: line) { error in
            XCTAssertTrue(error.localizedDescription.contains(what), error.localizedDescription, line: line)
        }
    }

    func testWrongNamesShapesAndTypesAreCaught() throws {
        assertRefuses("no function encode") { _ = try load("encode", linear) }
        let decode = try load("decode", linear)
        let state = decode.makeState()
        let (ids, position) = (integers([5], [1, 1]), integers([0], [1]))
        _ = try decode.prediction(from: inputs(["inputIds": ids, "position": position]), using: state)
        let wrong: [(String, [String: MLMultiArray])] = [
            ("takes", ["input_ids": ids, "position": position]),
            ("takes", ["inputIds": ids]),
            ("takes", ["inputIds": ids, "position": position, "length": position]),
            ("inputIds is", ["inputIds": integers([5], [1]), "position": position]),
            ("position is", ["inputIds": ids, "position": integers([1], [1, 1])]),
            (
                "holds",
                ["inputIds": MLMultiArray(MLShapedArray<Float>(scalars: [5], shape: [1, 1])), "position": position]
            ),
        ]
        for (what, arrays) in wrong {
            assertRefuses(what) { _ = try decode.prediction(from: inputs(arrays), using: state) }
        }
        assertRefuses("needs a state") {
            _ = try decode.prediction(from: inputs(["inputIds": ids, "position": position]))
        }
    }

    func testCallsAtTheWrongPhaseAreCaught() async throws {
        let model = try await load(linear)
        for position in 0..<3 { _ = try await model.decode(5, position: position) }
        let block = [Int](repeating: 1, count: model.info.prefillTokens)
        await assertRefusesAsync("prefill at phase 3") { _ = try await model.prefill(block, length: 3) }
        await assertRefusesAsync("decode at position 4") { _ = try await model.decode(5, position: 4) }
        let saved = try await model.state(position: 3)
        try await model.restore(saved)  // after which only the open rows say where the mini-batch stands
        await assertRefusesAsync("prefill at phase") { _ = try await model.prefill(block, length: 3) }
        _ = try await model.decode(5, position: 3)
    }

    func testTwoPredictionsAtOnceAreCaught() throws {
        let decode = try load("decode", linear)
        let state = UncheckedState(decode.makeState())
        let arrays = ["inputIds": integers([5], [1, 1]), "position": integers([0], [1])]
        let provider = try inputs(arrays)
        let second = Second(decode, provider)
        StandIn.shared.whilePredicting {
            StandIn.shared.whilePredicting(nil)
            second.run(state.value)
        }
        _ = try decode.prediction(from: provider, using: state.value)
        XCTAssertEqual(second.message, "two predictions use one state at the same time")
    }

    private func assertRefusesAsync(_ what: String, line: UInt = #line, _ body: () async throws -> Void) async {
        do {
            try await body()
            XCTFail("no error", line: line)
        } catch {
            XCTAssertTrue(error.localizedDescription.contains(what), error.localizedDescription, line: line)
        }
    }
}

private struct UncheckedState: @unchecked Sendable {
    let value: MLState

    init(_ value: MLState) {
        self.value = value
    }
}

/// A prediction in the midst of another.
private final class Second: @unchecked Sendable {
    private let model: MLModel
    private let provider: MLDictionaryFeatureProvider
    private(set) var message: String?

    init(_ model: MLModel, _ provider: MLDictionaryFeatureProvider) {
        self.model = model
        self.provider = provider
    }

    func run(_ state: MLState) {
        do {
            _ = try model.prediction(from: provider, using: state)
        } catch {
            message = error.localizedDescription
        }
    }
}
#endif
