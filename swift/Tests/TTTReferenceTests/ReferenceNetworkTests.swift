import TTTFormats
import XCTest

@testable import TTTReference
import TTTTestSupport

final class ReferenceNetworkTests: XCTestCase {
    /// Logits at these positions of a text, [positions][V].
    private func logits(_ network: ReferenceNetwork, _ ids: [Int], at positions: [Int]) throws -> [[Float]] {
        var state = network.start
        var found: [[Float]] = []
        for (position, id) in ids.enumerated() {
            let hidden = try network.read(id, &state)
            if positions.contains(position) { found.append(network.logits(hidden)) }
        }
        return found
    }

    private func largestDifference(_ a: [Float], _ b: [Float]) -> Float {
        XCTAssertEqual(a.count, b.count)
        return zip(a, b).reduce(0) { max($0, abs($1.0 - $1.1)) }
    }

    func testLogitsAreThoseOfPython() throws {
        for (name, directory) in [("linear", Files.bundled), ("mlp", Files.golden("mlp-mamba"))] {
            let expected = try Files.arrays("\(name).safetensors")
            let positions = try expected.integers("positions")
            let found = try logits(
                ReferenceNetwork(directory: directory), expected.integers("ids"), at: positions)
            let difference = largestDifference(found.flatMap { $0 }, try expected.tensor("logits").values)
            print("\(name): logits differ from Python's by \(difference) at most")
            XCTAssertLessThan(difference, 1e-4, name)
        }
    }

    func testLearningAndSignalsAreThoseOfPython() throws {
        for (name, directory) in [("linear", Files.bundled), ("mlp", Files.golden("mlp-mamba"))] {
            let network = try ReferenceNetwork(directory: directory)
            for scale in ["one", "uneven", "frozen"] {
                let expected = try LearningCase(name, scale)
                var (state, seen, found) = (network.start, [TTTSignals](), [[Float]]())
                for (position, id) in expected.ids.enumerated() {
                    let (hidden, signals) = try network.observe(id, &state, learning: expected.learning)
                    seen.append(signals)
                    if expected.positions.contains(position) { found.append(network.logits(hidden)) }
                }
                let largest = expected.logits.flatMap { $0 }.reduce(0) { max($0, abs($1)) }
                let difference = largestDifference(found.flatMap { $0 }, expected.logits.flatMap { $0 }) / largest
                XCTAssertLessThan(difference, 1e-4, "\(name), \(scale)")
                let signals = expected.differences(seen)
                print("\(name), learning \(scale): logits differ by \(difference), signals by \(signals)")
                for (signal, difference) in signals {
                    XCTAssertLessThan(difference, 1e-4, "\(name), \(scale), \(signal)")
                }
                if scale == "frozen" { XCTAssertEqual(state.map(\.weights), network.start.map(\.weights)) }
            }
        }
    }

    /// What the official implementation computed, for all layouts of safetensors.
    func testLogitsAreThoseOfTheOfficialImplementation() throws {
        for name in ["linear-transformer", "linear-transformer-head96", "linear-mamba-sharded", "mlp-mamba"] {
            let expected = try Safetensors(contentsOf: Files.golden(name).appendingPathComponent("expected.safetensors"))
            let length = try XCTUnwrap(expected.shape(of: "input_ids"))[1]
            let ids = Array(try expected.integers("input_ids").prefix(40))
            let network = try ReferenceNetwork(directory: Files.golden(name))
            let found = try logits(network, ids, at: Array(ids.indices)).flatMap { $0 }
            let values = try expected.tensor("logits").values
            XCTAssertEqual(values.count, 2 * length * network.configuration.vocabularySize)
            let difference = largestDifference(found, Array(values.prefix(found.count)))
            let largest = values.reduce(0) { max($0, abs($1)) }
            print("\(name): logits differ by \(difference) at most, the largest is \(largest)")
            XCTAssertLessThan(difference, 1e-4 * max(1, largest), name)
        }
    }

    func testTheLikeliestTextIsPythonsFor300Tokens() throws {
        for (name, directory) in [("linear", Files.bundled), ("mlp", Files.golden("mlp-mamba"))] {
            let expected = try Files.json("\(name).json")
            let network = try ReferenceNetwork(directory: directory)
            var state = network.start
            var hidden: [Float] = []
            for id in expected["prompt_ids"]?.integers ?? [] { hidden = try network.read(id, &state) }
            let ids = expected["greedy_ids"]?.integers ?? []
            XCTAssertEqual(ids.count, 300)
            for (index, id) in ids.enumerated() {
                let logits = network.logits(hidden)
                let best = logits.indices.max { (logits[$0], $1) < (logits[$1], $0) }
                guard best == id else { return XCTFail("\(name): token \(index) is \(best ?? -1), Python's is \(id)") }
                hidden = try network.read(id, &state)
            }
        }
    }

    func testRefusesATokenOutsideTheVocabulary() throws {
        let network = try ReferenceNetwork(directory: Files.golden("mlp-mamba"))
        var state = network.start
        for token in [-1, network.configuration.vocabularySize] {
            XCTAssertThrowsError(try network.read(token, &state))
        }
    }

    func testSaysWhatADirectoryLacks() throws {
        XCTAssertThrowsError(try ReferenceNetwork(directory: Files.root)) { error in
            XCTAssertTrue(error.localizedDescription.hasPrefix("config.json cannot be read"), error.localizedDescription)
        }
    }
}
