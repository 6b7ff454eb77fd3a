import Foundation
import TTTFormats
import TTTReference
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

    /// - Parameter refuses: at least so many of a hundred.
    private func fuzz(
        _ name: String, _ data: Data, times: Int? = nil, refuses: Int = 10, _ read: (Data) throws -> Void
    ) throws {
        let count = times ?? self.count
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
        XCTAssertGreaterThan(refused * 100, count * refuses, name)
    }

    func testStateFiles() throws {
        try fuzz("state", Data(contentsOf: Files.fixture("small/python.state"))) { _ = try StateFile.decoded($0) }
    }

    /// The arrays of a state that has the right digest are still of any shape.
    func testStatesThatAnotherProgramWrote() throws {
        let state = try TextState(contentsOf: Files.fixture("small/python.state"))
        let directory = Files.fixture("small")
        let network = try ReferenceNetwork(directory: directory)
        var random = SplitMix64(state: 1)
        for _ in 0..<count {
            var changed = state
            let layer = Int.random(in: 0..<changed.layers.count, using: &random)
            let rows = changed.layers[layer].rows
            let size = Int.random(in: 0..<8, using: &random)
            switch Int.random(in: 0..<6, using: &random) {
            case 0: changed.layers[layer].rows = Tensor(zeros: [1, size, rows.shape[2], rows.shape[3]])
            case 1: changed.layers[layer].weights.removeLast()
            case 2: changed.layers[layer].history["conv_\(size)"] = Tensor(zeros: [size])
            case 3: changed.layers.append(changed.layers[layer])
            case 4: changed.tokens = (0..<size).map { $0 - 2 << (8 * $0) }
            default: for i in changed.layers.indices { changed.layers[i].offset = .max - size }
            }
            guard let read = try? StateFile.decoded(StateFile.encoded(changed)) else { continue }
            XCTAssertEqual(
                zip(read.layers, network.start).allSatisfy { $0.hasShape(of: $1) }
                    && read.layers.count == network.start.count,
                zip(changed.layers, network.start).allSatisfy { $0.hasShape(of: $1) }
                    && changed.layers.count == network.start.count)
        }
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

    /// A model directory of which one file is damaged, up to the logits.
    func testModelDirectories() throws {
        let directory = FileManager.default.temporaryDirectory.appendingPathComponent("fuzz-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: directory) }
        for changed in ["config.json", "model.safetensors"] {
            try? FileManager.default.removeItem(at: directory)
            try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
            for name in ["config.json", "model.safetensors"] {
                try FileManager.default.copyItem(
                    at: Files.fixture("small").appendingPathComponent(name), to: directory.appendingPathComponent(name))
            }
            let file = directory.appendingPathComponent(changed)
            try fuzz("directory with another \(changed)", Data(contentsOf: file), times: count / 4) { data in
                try data.write(to: file)
                let network = try ReferenceNetwork(directory: directory)
                var state = network.start
                for token in 0..<6 { _ = network.logits(try network.read(token, &state)) }
            }
        }
    }

    func testLayouts() throws {
        let text = try XCTUnwrap(Files.arrays("layout-mlp.safetensors").metadata["layout"])
        try fuzz("layout", Data(text.utf8)) { data in
            let description = try JSON(data)
            let layout = try StateLayout(description)
            _ = try StateGroups(description, layout: layout)
        }
    }

    func testPackages() throws {
        let facts = try Files.json("linear.bundle/metadata.json")["user_data"]?.members ?? []
        let source = ModelSource(
            fingerprint: "a", modelFingerprint: facts.first { $0.key == "com.mlx-ttt.model" }?.value.string ?? "",
            startWeights: [])
        let text = "{\(facts.map { "\(quoted($0.key)): \(quoted($0.value.string ?? ""))" }.joined(separator: ", "))}"
        try fuzz("package", Data(text.utf8)) { data in
            let members = try JSON(data).members ?? []
            let metadata = Dictionary(members.map { ($0.key, $0.value.string ?? "") }) { $1 }
            _ = try TTTModelInfo(metadata: metadata, source: source)
        }
    }

    func testTokenizers() throws {
        for name in ["llama-2", "unigram-symbols", "unigram-nfkc", "bytes-llama-3"] {
            let file = Files.fixture("tokenizers/\(name)/tokenizer.json")
            try fuzz(name, Data(contentsOf: file)) { data in
                let tokenizer = try JSONTokenizer(JSON(data), settings: .object([]))
                let ids = try tokenizer.encode("the naïve 🙂  inhabitants\n", addingSpecialTokens: true)
                _ = tokenizer.decode(ids + [-1, 1_000_000])
            }
        }
    }

    func testChatTemplates() throws {
        let messages = [ChatMessage(role: "system", content: "Be kind."), ChatMessage(role: "user", content: " Hi\n")]
        for entry in try Files.json("templates.json")["templates"]?.members ?? [] {
            try fuzz("template \(entry.key)", Data((entry.value.string ?? "").utf8), refuses: 20) { data in
                _ = try ChatTemplate(String(decoding: data, as: UTF8.self), tokens: ["bos_token": "<s>"])(messages)
            }
        }
    }

    func testWhatOnceTrapped() throws {
        let chain = String(repeating: "+ 1 ", count: 100_000)
        XCTAssertThrowsError(try ChatTemplate("{{ 1 \(chain)}}"))
        let most = "5000000000000000000 % 9000000000000000000"
        XCTAssertEqual(try ChatTemplate("{{ \(most) }}, {{ -7 % 3 }}")([]), "5000000000000000000, 2")
        XCTAssertThrowsError(try ModelConfiguration(JSON(#"{"mini_batch_size": 1000000000}"#.utf8)))
        XCTAssertThrowsError(
            try TTTModelInfo(
                miniBatchSize: 1, vocabularySize: 1 << 40, prefillTokens: 1, endTokens: [], fingerprint: ""))
        XCTAssertThrowsError(
            try TTTModelInfo(
                miniBatchSize: 1, vocabularySize: 9, prefillTokens: 1 << 40, endTokens: [], fingerprint: ""))
    }
}
