import TTTFormats
import XCTest

@testable import TTTKit
import TTTTestSupport

final class SamplerTests: XCTestCase {
    private let logits: [Float] = [0.5, 2, -1, 1.5, 0]

    private func tokens(_ options: TTTOptions, count: Int = 4000) throws -> [Int] {
        var sampler = Sampler(options)
        return try (0..<count).map { _ in try sampler.next(logits) }
    }

    func testTemperatureZeroTakesTheFirstOfTheLikeliest() throws {
        var sampler = Sampler(TTTOptions())
        XCTAssertEqual(try sampler.next(logits), 1)
        XCTAssertEqual(try sampler.next([3, 7, 7, -2]), 1)
    }

    func testASeedGivesTheSameTokens() throws {
        let options = TTTOptions(temperature: 1, seed: 7)
        XCTAssertEqual(try tokens(options), try tokens(options))
        XCTAssertNotEqual(try tokens(options), try tokens(TTTOptions(temperature: 1, seed: 8)))
    }

    func testTheGeneratorIsSplitMix64() {
        var random = SplitMix64(state: 0)
        XCTAssertEqual(random.next(), 0xE220_A839_7B1D_CDAF)
        XCTAssertEqual(random.next(), 0x6E78_9E6A_A1B9_65F4)
    }

    func testTakesTokensAsOftenAsTheyAreLikely() throws {
        for temperature in [0.5, 1, 2] {
            let drawn = try tokens(TTTOptions(temperature: temperature, seed: 1), count: 20_000)
            let weights = logits.map { exp(Double($0) / temperature) }
            for token in logits.indices {
                let expected = weights[token] / weights.reduce(0, +)
                let share = Double(drawn.filter { $0 == token }.count) / 20_000
                XCTAssertEqual(share, expected, accuracy: 0.02, "token \(token) at temperature \(temperature)")
            }
        }
    }

    func testTopKKeepsTheLikeliest() throws {
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topK: 1, seed: 1))), [1])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topK: 3, seed: 1))), [0, 1, 3])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topK: 99, seed: 1))), [0, 1, 2, 3, 4])
    }

    func testTopPKeepsTheFewestThatReachIt() throws {
        // Probabilities of tokens 0 to 4: 0.11, 0.50, 0.02, 0.30, 0.07.
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topP: 0.01, seed: 1))), [1])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topP: 0.6, seed: 1))), [1, 3])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, topP: 0.85, seed: 1))), [0, 1, 3])
    }

    func testMinPIsRelativeToTheLikeliest() throws {
        // Relative to token 1: 0.22, 1, 0.05, 0.61, 0.14 (tokens 0 to 4).
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, minP: 1, seed: 1))), [1])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, minP: 0.5, seed: 1))), [1, 3])
        XCTAssertEqual(Set(try tokens(TTTOptions(temperature: 1, minP: 0.1, seed: 1))), [0, 1, 3, 4])
    }

    func testRefusesLogitsThatAreNotFinite() {
        for bad in [[Float.nan, 1], [1, .infinity], []] {
            var sampler = Sampler(TTTOptions())
            XCTAssertThrowsError(try sampler.next(bad)) { XCTAssertEqual($0 as? TTTError, .notANumber) }
        }
    }

    func testReadsAGenerationConfig() throws {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).json")
        defer { try? FileManager.default.removeItem(at: file) }
        try Data(#"{"do_sample": true, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 5, "x": []}"#.utf8)
            .write(to: file)
        XCTAssertEqual(
            try TTTOptions(generationConfig: file), TTTOptions(maxTokens: 5, temperature: 0.8, topP: 0.9))
    }

    /// Pearson's chi-square test of 100 000 draws.
    func testDistributionsAreThoseOfPython() throws {
        let file = try Files.json("samplers.json")
        let logits = (file["logits"]?.array ?? []).compactMap(\.number).map { Float($0) }
        let cases = file["cases"]?.array ?? []
        XCTAssertEqual(cases.count, 5)
        for entry in cases {
            func option(_ name: String) -> Double { entry[name]?.number ?? -1 }
            let options = TTTOptions(
                temperature: option("temperature"), topK: Int(option("top_k")), topP: option("top_p"),
                minP: option("min_p"), repetitionPenalty: option("penalty"), seed: 1)
            var sampler = Sampler(options)
            var counts = [Int](repeating: 0, count: logits.count)
            let draws = 100_000
            for _ in 0..<draws { counts[try sampler.next(logits, after: file["context"]?.integers ?? [])] += 1 }
            let expected = (entry["probabilities"]?.array ?? []).compactMap(\.number)
            var (statistic, freedom) = (0.0, -1.0)
            for (count, probability) in zip(counts, expected) {
                guard probability > 0 else {
                    XCTAssertEqual(count, 0)
                    continue
                }
                let mean = probability * Double(draws)
                statistic += (Double(count) - mean) * (Double(count) - mean) / mean
                freedom += 1
            }
            // Five standard deviations; another distribution is far beyond it.
            XCTAssertLessThan(statistic, freedom + 5 * (2 * freedom).squareRoot(), "\(options)")
        }
    }
}
