import XCTest

@testable import TTTKit

final class DetokenizerTests: XCTestCase {
    private func text(_ bytes: [UInt8]) -> String {
        ByteTokenizer().decode(bytes.map { Int($0) })
    }

    func testHoldsBackHalfACharacter() {
        var detokenizer = Detokenizer(ByteTokenizer())
        XCTAssertEqual([0xF0, 0x9F, 0x99].flatMap { detokenizer.append($0) }, [])
        XCTAssertEqual(detokenizer.append(0x82), Array("🙂".utf8))
        XCTAssertEqual(text([0x61, 0xC3]), "a")
    }

    func testEachByteOfNoCharacterIsReplaced() {
        XCTAssertEqual(text([0x80, 0x61]), "\u{FFFD}a")
        XCTAssertEqual(text([0xC3, 0x61]), "\u{FFFD}a")
        XCTAssertEqual(text([0xF0, 0x9F, 0x61]), "\u{FFFD}\u{FFFD}a")
        XCTAssertEqual(text([0xED, 0xA0, 0x80, 0xC0, 0xF5]), "\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}")
    }
}

final class TextStreamTests: XCTestCase {
    func testEveryWayToCutATextAddsUpToIt() {
        let bytes = Array("naïve 🙂 日本".utf8)
        for cut in 0...bytes.count where cut == bytes.count || bytes[cut] & 0xC0 != 0x80 {
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
        "com.mlx-ttt.weights": "int8",
    ]
    private let source = ModelSource(fingerprint: "abcd", modelFingerprint: "abc", startWeights: [])

    func testReadsThePackagesMetadata() throws {
        let info = try TTTModelInfo(metadata: metadata, source: source)
        XCTAssertEqual(
            info,
            try TTTModelInfo(
                miniBatchSize: 16, vocabularySize: 2048, prefillTokens: 64, endTokens: [2, 7],
                fingerprint: "abcd", weights: "int8"))
    }

    func testReadsWhetherThereAreAScaleAndSignals() throws {
        func info(_ more: [String: String]) throws -> TTTModelInfo {
            try TTTModelInfo(metadata: metadata.merging(more) { $1 }, source: source)
        }
        let plain = try info([:])
        XCTAssertNil(plain.learningShape)
        XCTAssertFalse(plain.givesSignals)
        let scaled = try info(["com.mlx-ttt.learning": "[6, 4]"])
        XCTAssertEqual(scaled.learningShape, [6, 4])
        XCTAssertFalse(scaled.givesSignals)
        let shown = try info(["com.mlx-ttt.signals": #"["loss", "lr", "writeNorm"]"#])
        XCTAssertNil(shown.learningShape)
        XCTAssertTrue(shown.givesSignals)
        for (key, wrong) in [
            ("learning", "6"), ("learning", "[6]"), ("learning", #"[6, "4"]"#), ("learning", "[0, 4]"),
            ("learning", "[9000000000000000000, 9000000000000000000]"), ("learning", "yes"), ("signals", #"["loss"]"#),
            ("signals", "true"),
        ] {
            XCTAssertThrowsError(try info(["com.mlx-ttt.\(key)": wrong])) { error in
                XCTAssertTrue(error.localizedDescription.contains("com.mlx-ttt.\(key)"), error.localizedDescription)
            }
        }
    }

    func testRefusesMetadataThatIsNotOurs() {
        for key in metadata.keys {
            var missing = metadata
            missing[key] = nil
            XCTAssertThrowsError(try TTTModelInfo(metadata: missing, source: source)) { error in
                XCTAssertTrue(error.localizedDescription.contains(key), error.localizedDescription)
            }
        }
        for (key, wrong) in [("prefill_tokens", "24"), ("mini_batch_size", "sixteen"), ("eos_token_id", "null"), ("model", "xyz")] {
            let changed = metadata.merging(["com.mlx-ttt.\(key)": wrong]) { $1 }
            XCTAssertThrowsError(try TTTModelInfo(metadata: changed, source: source))
        }
        let newer = metadata.merging(["com.mlx-ttt.format": "2"]) { $1 }
        XCTAssertThrowsError(try TTTModelInfo(metadata: newer, source: source)) { error in
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

        var leadingSpaces: LeadingSpaces { .first }
    }

    func testTextInTheMiddleGetsNoPrefix() throws {
        XCTAssertEqual(try Prefixing().encodeMiddle("ab"), [97, 98])
        XCTAssertEqual(try Prefixing().encodeMiddle(""), [])
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
