import Foundation
import TTTFormats
import XCTest

@testable import TTTKit
import TTTTestSupport

/// Damaged files give errors. A trap would end the process.
///
/// `TTT_FUZZ` is how many mutations are tried of each file, 200 by default.
final class FuzzTests: XCTestCase {
    private let count = ProcessInfo.processInfo.environment["TTT_FUZZ"].flatMap { Int($0) } ?? 200
    private static let words = [
        "-1", "0", "9223372036854775807", "1e999", "4611686018427387904", "null", "[]", "{}", "\"\"", "true", "65536",
    ]

    private func mutated(_ data: Data, _ random: inout SplitMix64) -> Data {
        var bytes = [UInt8](data)
        for _ in 0...Int.random(in: 0..<3, using: &random) {
            // Half of the time near the beginning, where headers are.
            let limit = Bool.random(using: &random) ? min(bytes.count, 2000) : bytes.count
            guard limit > 0 else { break }
            let at = Int.random(in: 0..<limit, using: &random)
            switch Int.random(in: 0..<6, using: &random) {
            case 0: bytes[at] ^= 1 << UInt8.random(in: 0..<8, using: &random)
            case 1: bytes[at] = UInt8.random(in: 0...255, using: &random)
            case 2: bytes.removeSubrange(at..<min(at + Int.random(in: 1..<40, using: &random), bytes.count))
            case 3: bytes.insert(contentsOf: bytes[at..<min(at + 30, bytes.count)], at: at)
            case 4: bytes = Array(bytes[..<at])
            default:
                guard let number = bytes[at...].firstIndex(where: { (0x30...0x39).contains($0) }) else { continue }
                let end = bytes[number...].firstIndex { !(0x30...0x39).contains($0) } ?? bytes.count
                let word = Self.words.randomElement(using: &random) ?? ""
                bytes.replaceSubrange(number..<end, with: Array(word.utf8))
            }
        }
        return Data(bytes)
    }

    private func fuzz(_ name: String, _ data: Data, _ read: (Data) throws -> Void) throws {
        try read(data)
        var random = SplitMix64(state: UInt64(name.utf8.count))
        var refused = 0
        for _ in 0..<count {
            do {
                try read(mutated(data, &random))
            } catch {
                refused += 1
                XCTAssertTrue(error is TTTError, "\(name): \(error)")
            }
        }
        XCTAssertGreaterThan(refused, count / 10, name)
    }

    func testStateFiles() throws {
        try fuzz("state", Data(contentsOf: Files.fixture("small/python.state"))) { _ = try StateFile.decoded($0) }
    }

    func testSafetensors() throws {
        try fuzz("safetensors", Data(contentsOf: Files.fixture("layout-linear.safetensors"))) { data in
            let file = try Safetensors(data)
            for name in file.names { _ = try file.tensor(name) }
        }
    }

    func testConfigurations() throws {
        try fuzz("config", Data(contentsOf: Files.fixture("small/config.json"))) { data in
            _ = try ModelConfiguration(JSON(data))
        }
    }

    func testLayouts() throws {
        let text = try XCTUnwrap(Files.arrays("layout-mlp.safetensors").metadata["layout"])
        try fuzz("layout", Data(text.utf8)) { _ = try StateLayout(JSON($0)) }
    }

    func testTokenizers() throws {
        for name in ["llama-2", "unigram-symbols", "bytes-llama-3"] {
            let file = Files.fixture("tokenizers/\(name)/tokenizer.json")
            try fuzz(name, Data(contentsOf: file)) { data in
                let tokenizer = try JSONTokenizer(JSON(data), settings: .object([]))
                let ids = try tokenizer.encode("the naïve 🙂  inhabitants\n", addingSpecialTokens: true)
                _ = tokenizer.decode(ids + [-1, 1_000_000])
            }
        }
    }
}
