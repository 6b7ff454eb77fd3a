import Foundation
import TTTFormats
import TTTKit
import XCTest

@testable import TTTCommand
import TTTTestSupport

final class CommandTests: XCTestCase {
    private let small = Files.fixture("small").path
    private let folder = FileManager.default.temporaryDirectory.appendingPathComponent("ttt-\(UUID().uuidString)")

    override func setUpWithError() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: folder)
    }

    private final class Said: @unchecked Sendable {
        private let lock = NSLock()
        private var text = ""

        func append(_ piece: String) { lock.withLock { text += piece } }

        var all: String { lock.withLock { text } }
    }

    private func run(_ arguments: [String], input: [String] = []) async -> (status: Int32, output: String, remarks: String) {
        let (output, remarks, lines) = (Said(), Said(), Lines(input))
        let command = Command(
            output: { output.append($0) }, remarks: { remarks.append($0) }, nextLine: { lines.next() })
        let status = await command.run(arguments)
        return (status, output.all, remarks.all)
    }

    private final class Lines: @unchecked Sendable {
        private let lock = NSLock()
        private var rest: [String]

        init(_ lines: [String]) { rest = lines.reversed() }

        func next() -> String? { lock.withLock { rest.popLast() } }
    }

    func testGoesOnWithAStateOfPython() async throws {
        let state = Files.fixture("small/python.state").path
        let expected = try Files.json("small/expected.json")["text"]?.string ?? ""
        let found = await run(["generate", "--model", small, "--load-state", state, "--max-tokens", "40"])
        XCTAssertEqual(found.status, 0, found.remarks)
        XCTAssertEqual(found.output, expected + "\n")
        XCTAssertTrue(found.remarks.contains("slow"), found.remarks)
    }

    func testASavedStateGoesOn() async throws {
        let file = folder.appendingPathComponent("book.state").path
        let arguments = ["generate", "--model", small, "--prompt", "the inhabitants"]
        let whole = await run(arguments + ["--max-tokens", "30"])
        let first = await run(arguments + ["--max-tokens", "13", "--save-state", file])
        let second = await run(["generate", "--model", small, "--load-state=\(file)", "--max-tokens", "17"])
        XCTAssertEqual(second.status, 0, second.remarks)
        XCTAssertEqual(first.output.dropLast() + second.output, whole.output)
        let shown = await run(["state", "show", file])
        XCTAssertTrue(shown.output.hasPrefix("book.state: "), shown.output)
        XCTAssertTrue(shown.output.contains("TTT-Linear with 2 layers of 2 heads"), shown.output)
    }

    func testChatReadsLines() async throws {
        let found = await run(["chat", "--model", small, "--max-tokens", "3"], input: ["the an", "in er"])
        XCTAssertEqual(found.status, 0, found.remarks)
        XCTAssertEqual(found.remarks.components(separatedBy: "tokens/s").count, 3)
    }

    func testALearningScaleChangesTheText() async throws {
        let arguments = ["generate", "--model", small, "--prompt", "the inhabitants", "--max-tokens", "30"]
        let plain = await run(arguments)
        let one = await run(arguments + ["--learning", "1"])
        XCTAssertEqual(one.output, plain.output)
        let file = folder.appendingPathComponent("frozen.state")
        let frozen = await run(arguments + ["--learning=0", "--save-state", file.path])
        XCTAssertEqual(frozen.status, 0, frozen.remarks)
        XCTAssertNotEqual(frozen.output, plain.output)
        let start = try await startWeights()
        XCTAssertEqual(try TextState(contentsOf: file).layers.map(\.weights), start)
    }

    func testChatTakesALearningScale() async throws {
        let file = folder.appendingPathComponent("chat.state")
        let arguments = ["chat", "--model", small, "--max-tokens", "9", "--save-state", file.path]
        let start = try await startWeights()
        for (more, learns) in [(["--learning", "0"], false), ([], true)] {
            let found = await run(arguments + more, input: ["the an"])
            XCTAssertEqual(found.status, 0, found.remarks)
            XCTAssertEqual(try TextState(contentsOf: file).layers.map(\.weights) != start, learns)
        }
    }

    /// Of the inner models before the first token.
    private func startWeights() async throws -> [[Tensor]] {
        let tokenizer = try JSONTokenizer(folder: Files.fixture("small"))
        let model = try ReferenceTTTModel(directory: Files.fixture("small"), vocabulary: tokenizer.vocabulary)
        return await model.state(position: 0).map(\.weights)
    }

    func testAStateOfAnotherModelIsRefused() async throws {
        let state = Files.fixture("small/python.state").path
        let found = await run(["generate", "--model", Files.bundled.path, "--load-state", state])
        XCTAssertEqual(found.status, 2)
        XCTAssertTrue(found.remarks.contains("another model"), found.remarks)
    }

    func testErrorsAreOneLine() async throws {
        for arguments in [
            [], ["write"], ["generate"], ["generate", "--model"], ["generate", "--model", "/nowhere"],
            ["generate", "--model", small, "--max-tokens", "x"], ["generate", "--model", small, "--top-p", "2"],
            ["generate", "--model", small], ["state", "show"], ["state", "show", "/nowhere"], ["state", "--x", "1"],
            ["verify", "--model", small], ["generate", "--model", small, "--prompt", "a", "--learning", "x"],
            ["generate", "--model", small, "--prompt", "a", "--learning=-1"],
            ["chat", "--model", small, "--learning", "nan"],
        ] {
            let found = await run(arguments)
            XCTAssertEqual(found.status, 2, "\(arguments)")
            XCTAssertEqual(found.output.trimmingCharacters(in: .newlines), "", "\(arguments)")
            let error = found.remarks.split(separator: "\n").last ?? ""
            XCTAssertTrue(error.hasPrefix("ttt: "), "\(arguments): \(found.remarks)")
        }
    }
}
