import Foundation
import TTTFormats
import XCTest

@testable import TTTKit
import TTTTestSupport

final class JSONTokenizerTests: XCTestCase {
    private static let names = [
        "llama-2", "no-byte-fallback", "symbols", "single-spaces", "unigram-nfkc", "unigram-symbols", "bundled",
        "bytes-gpt-2", "bytes-llama-3",
    ]

    /// Where the tokenizers and their cases are. `TTT_TOKENIZERS` names a folder with more of them.
    private func folder(_ name: String) -> (tokenizer: URL, cases: URL) {
        let more = ProcessInfo.processInfo.environment["TTT_TOKENIZERS"].map { URL(fileURLWithPath: $0) }
        let folder = (more ?? Files.fixture("tokenizers")).appendingPathComponent(name)
        let tokenizer = name == "bundled" ? Files.bundled : folder
        return (tokenizer, folder.appendingPathComponent("cases.json"))
    }

    private func forEach(_ body: (String, JSONTokenizer, JSON) throws -> Void) throws {
        for name in Self.names {
            let (tokenizer, cases) = folder(name)
            try body(name, JSONTokenizer(folder: tokenizer), JSON(Data(contentsOf: cases)))
        }
    }

    func testIDsAreThoseOfPython() throws {
        try forEach { name, tokenizer, cases in
            let texts = cases["texts"]?.array ?? []
            var differing = 0
            for entry in texts {
                let text = entry["text"]?.string ?? ""
                let (found, expected) = (try tokenizer.encode(text, addingSpecialTokens: false), entry["ids"]?.integers)
                guard found != expected else { continue }
                differing += 1
                if differing <= 3 {
                    let scalars = text.unicodeScalars.map { String($0.value, radix: 16) }.joined(separator: " ")
                    print("\(name): [\(scalars)] gives \(found), expected \(expected ?? [])")
                }
            }
            XCTAssertEqual(differing, 0, "\(name): of \(texts.count) texts")
            XCTAssertGreaterThan(texts.count, 20)
            XCTAssertEqual(try tokenizer.encode("a", addingSpecialTokens: true), cases["whole"]?.integers)
        }
    }

    func testTextIsThatOfPython() throws {
        try forEach { name, tokenizer, cases in
            for run in cases["runs"]?.array ?? [] {
                let ids = run["ids"]?.integers ?? []
                let (found, expected) = (tokenizer.decode(ids), run["text"]?.string ?? "")
                XCTAssertTrue(found.utf8.elementsEqual(expected.utf8), "\(name): \(ids) is \(found), expected \(expected)")
            }
        }
    }

    /// Any tokens, bytes that are no text included: each piece is whole code points, and the pieces add up to the text.
    func testNoStreamSplitsACodePoint() throws {
        try forEach { name, tokenizer, cases in
            for run in cases["runs"]?.array ?? [] {
                var detokenizer = Detokenizer(tokenizer)
                var stream = TextStream(stopStrings: ["never 🙂"])
                var text = ""
                for id in run["ids"]?.integers ?? [] {
                    let bytes = detokenizer.append(id)
                    XCTAssertNotNil(String(validating: bytes, as: UTF8.self), name)
                    let piece = stream.append(bytes)
                    text += piece
                }
                text += stream.finish()
                XCTAssertTrue(text.utf8.elementsEqual((run["text"]?.string ?? "").utf8), "\(name): \(run)")
            }
        }
    }

    func testStreamedTextIsTheTextAndNeverHalfACharacter() throws {
        let tokenizer = try JSONTokenizer(folder: Files.bundled)
        let text = "naïve 🙂 👩\u{200D}👧 日本 e\u{301} \u{1F1E9}\u{1F1EA}"
        var detokenizer = Detokenizer(tokenizer)
        var streamed: [UInt8] = []
        for token in try tokenizer.encode(text, addingSpecialTokens: true) {
            let piece = detokenizer.append(token)
            XCTAssertNotNil(String(validating: piece, as: UTF8.self))
            streamed += piece
        }
        XCTAssertEqual(String(decoding: streamed, as: UTF8.self), text)
    }

    func testRefusesWhatItDoesNotKnow() throws {
        let file = Files.bundled.appendingPathComponent("tokenizer.json")
        let text = try String(contentsOf: file, encoding: .utf8)
        for (old, new) in [
            ("\"type\": \"Sequence\"", "\"type\": \"Lowercase\""),
            ("\"type\": \"BPE\"", "\"type\": \"WordPiece\""), ("TemplateProcessing", "BertProcessing"),
        ] {
            XCTAssertTrue(text.contains(old), old)
            let json = try JSON(text.replacingOccurrences(of: old, with: new).utf8)
            XCTAssertThrowsError(try JSONTokenizer(json, settings: .object([])), new) { error in
                XCTAssertTrue(error.localizedDescription.contains("not known here"), error.localizedDescription)
            }
        }
    }
}
