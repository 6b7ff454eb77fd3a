import XCTest

@testable import TTTKit

final class TextStreamTests: XCTestCase {
    func testHoldsBackHalfACharacter() {
        var stream = TextStream(stopStrings: [])
        XCTAssertEqual(stream.append([0xF0, 0x9F]), "")
        XCTAssertEqual(stream.partialCharacter, [0xF0, 0x9F])
        XCTAssertEqual(stream.append([0x99, 0x82, 0x61, 0xC3]), "🙂a")
        XCTAssertEqual(stream.finish(), "")
        XCTAssertEqual(stream.partialCharacter, [0xC3])
    }

    func testBytesOfNoCharacterBecomeReplacements() {
        var stream = TextStream(stopStrings: [])
        XCTAssertEqual(stream.append([0x80, 0x61]), "\u{FFFD}a")
        XCTAssertEqual(stream.append([0xC3]) + stream.append([0x61]), "\u{FFFD}a")
    }

    func testEveryWayToCutATextAddsUpToIt() {
        let bytes = Array("naïve 🙂 日本".utf8)
        for cut in 0...bytes.count {
            var stream = TextStream(stopStrings: ["日本語"])
            let text = stream.append(Array(bytes[..<cut])) + stream.append(Array(bytes[cut...])) + stream.finish()
            XCTAssertEqual(text, "naïve 🙂 日本")
        }
    }

    func testTheFirstOfSeveralStopStringsCounts() {
        var stream = TextStream(stopStrings: ["cd", "", "bcx", "b"])
        XCTAssertEqual(stream.append(Array("abcd".utf8)), "a")
        XCTAssertTrue(stream.isStopped)
    }

    func testAStopStringThatOverlapsItself() {
        var stream = TextStream(stopStrings: ["aab"])
        XCTAssertEqual(stream.append(Array("aa".utf8)), "")
        XCTAssertEqual(stream.append(Array("ab".utf8)), "a")
        XCTAssertTrue(stream.isStopped)
    }
}

final class TTTModelInfoTests: XCTestCase {
    private let metadata = [
        "com.mlx-ttt.format": "1", "com.mlx-ttt.mini_batch_size": "16", "com.mlx-ttt.prefill_tokens": "64",
        "com.mlx-ttt.vocab_size": "2048", "com.mlx-ttt.eos_token_id": "[2, 7]", "com.mlx-ttt.model": "abc",
    ]

    func testReadsThePackagesMetadata() throws {
        let info = try TTTModelInfo(metadata: metadata)
        XCTAssertEqual(
            info,
            try TTTModelInfo(
                miniBatchSize: 16, vocabularySize: 2048, prefillTokens: 64, endTokens: [2, 7], fingerprint: "abc"))
    }

    func testRefusesMetadataThatIsNotOurs() {
        for key in metadata.keys {
            var missing = metadata
            missing[key] = nil
            XCTAssertThrowsError(try TTTModelInfo(metadata: missing)) { error in
                XCTAssertTrue(error.localizedDescription.contains(key), error.localizedDescription)
            }
        }
        for (key, wrong) in [("prefill_tokens", "24"), ("mini_batch_size", "sixteen"), ("eos_token_id", "null")] {
            let changed = metadata.merging(["com.mlx-ttt.\(key)": wrong]) { $1 }
            XCTAssertThrowsError(try TTTModelInfo(metadata: changed))
        }
        let newer = metadata.merging(["com.mlx-ttt.format": "2"]) { $1 }
        XCTAssertThrowsError(try TTTModelInfo(metadata: newer)) { error in
            XCTAssertEqual(error as? TTTError, .formatVersion(2))
        }
    }
}

final class TTTTokenizerTests: XCTestCase {
    /// Puts a space in front of every text but one that begins with a line break, as SentencePiece models do.
    private struct Prefixing: TTTTokenizer {
        func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
            ByteTokenizer().encode(text.hasPrefix("\n") ? text : " " + text, addingSpecialTokens: addingSpecialTokens)
        }

        func bytes(of token: Int) -> [UInt8] { [] }
    }

    func testTextInTheMiddleGetsNoPrefix() throws {
        XCTAssertEqual(try Prefixing().encodeMiddle("ab"), [97, 98])
        XCTAssertEqual(try Prefixing().encodeMiddle(""), [])
    }

    func testPieces() throws {
        let table = try PieceTable(json: Data(#"["", " a", [255], "é"]"#.utf8))
        XCTAssertEqual((0..<5).map { table.bytes(of: $0) }, [[], [32, 97], [255], [195, 169], []])
        XCTAssertThrowsError(try PieceTable(json: Data(#"[{"a": 1}]"#.utf8)))
    }
}

final class StridedMemoryTests: XCTestCase {
    func testWithoutGapsThereIsOneRun() {
        XCTAssertEqual(
            StridedMemory(shape: [2, 3, 4], strides: [12, 4, 1]).runs, [.init(inMemory: 0, packed: 0, count: 24)])
    }

    func testEachRowBehindAGapIsARun() {
        XCTAssertEqual(
            StridedMemory(shape: [2, 2, 3], strides: [16, 8, 1]).runs,
            [
                .init(inMemory: 0, packed: 0, count: 3), .init(inMemory: 8, packed: 3, count: 3),
                .init(inMemory: 16, packed: 6, count: 3), .init(inMemory: 24, packed: 9, count: 3),
            ])
    }

    func testOtherOrders() {
        XCTAssertEqual(
            StridedMemory(shape: [2, 2], strides: [1, 2]).runs.map(\.inMemory), [0, 2, 1, 3])
    }
}

final class TTTCheckTests: XCTestCase {
    /// What `mixing` writes after "abc", and the logits that it gives.
    private func check(text: String? = nil, logit: Double = 1, ids: [Int] = [256, 97]) async throws -> TTTCheck {
        let model = mixing(try .test())
        let generator = TTTGenerator(model: model, tokenizer: ByteTokenizer())
        let written = try await generator.text("abc", maxTokens: 6)
        let first = try XCTUnwrap(written.utf8.first)
        let expected: [String: Any] = [
            "prompts": [
                [
                    "prompt": "abc", "prompt_ids": [256, 97, 98, 99], "greedy_ids": written.utf8.map { Int($0) },
                    "greedy_text": text ?? written, "top_logits": [["id": Int(first), "logit": logit]],
                ] as [String: Any]
            ],
            "tokenization": [["text": "a", "ids": ids] as [String: Any]],
        ]
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).json")
        defer { try? FileManager.default.removeItem(at: file) }
        try JSONSerialization.data(withJSONObject: expected).write(to: file)
        return try await TTTCheck(model: mixing(try .test()), tokenizer: ByteTokenizer(), expected: file)
    }

    func testFindsNothingWhereAllAgrees() async throws {
        let found = try await check()
        XCTAssertEqual(found.differingTexts, [])
        XCTAssertEqual(found.differingPrompts, [])
        XCTAssertEqual(found.logitDifference, 0)
    }

    func testFindsWhatDiffers() async throws {
        let text = try await check(text: "something else")
        XCTAssertEqual(text.differingPrompts, ["abc"])
        let logits = try await check(logit: 2)
        XCTAssertEqual(logits.logitDifference, 0.5)
        let ids = try await check(ids: [256, 98])
        XCTAssertEqual(ids.differingTexts, ["a"])
    }
}
