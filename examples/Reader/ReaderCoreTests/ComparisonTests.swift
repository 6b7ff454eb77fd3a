import TTTKit
import XCTest

@testable import ReaderCore

final class ComparisonTests: ReaderTestCase {
    /// States after these texts.
    @MainActor private func saved(_ texts: [String], _ shelf: StateShelf) async throws -> [SavedState] {
        var states: [SavedState] = []
        for text in texts {
            let generator = try generator()
            try await generator.read(text)
            states.append(try await shelf.save(generator, title: text))
        }
        return states
    }

    @MainActor func testBothSidesGoOnAsTheyWouldAlone() async throws {
        let shelf = StateShelf(folder: states)
        let states = try await saved(["Once upon a time", "In the beginning"], shelf)
        let comparison = Comparison(states, generator: try generator(), shelf: shelf, tokensPerTurn: 4)
        for _ in 0..<2 {  // again from the same states
            comparison.start(" was", options: TTTOptions(maxTokens: 10))
            XCTAssertTrue(comparison.isWriting)
            await comparison.finish()
            for side in comparison.sides {
                let alone = try await expected(side.title + " was", 10)
                XCTAssertEqual(side.text, " was" + alone)
                XCTAssertTrue(side.isFinished)
            }
        }
        XCTAssertNotEqual(comparison.sides[0].text, comparison.sides[1].text)
        XCTAssertNil(comparison.problem)
    }

    @MainActor func testASideThatEndsWaitsForTheOther() async throws {
        let shelf = StateShelf(folder: states)
        let states = try await saved(["12345678", "1"], shelf)
        let model = try FakeModel(endsAt: 15)
        let generator = TTTGenerator(model: model, tokenizer: ByteTokenizer())
        let comparison = Comparison(states, generator: generator, shelf: shelf, tokensPerTurn: 4)
        comparison.start("", options: TTTOptions(maxTokens: 10))
        await comparison.finish()
        XCTAssertEqual(comparison.sides.map(\.text.count), [6, 10])  // BOS and 8 bytes, 6 letters, the end token
        XCTAssertTrue(comparison.sides.allSatisfy(\.isFinished))
    }

    @MainActor func testTheSessionStaysWhereItWas() async throws {
        let shelf = StateShelf(folder: states)
        let two = try await saved(["Once", "Twice"], shelf)
        let session = ReadingSession(generator: try generator(), shelf: shelf, options: TTTOptions(maxTokens: 9))
        session.open(Book(file: try write("A third text", to: "Third.txt")))
        await session.finish()
        let comparison = session.comparison(of: two)
        comparison.start(" and", options: TTTOptions(maxTokens: 10))
        await comparison.finish()
        session.goOn()
        await session.finish()
        let alone = try await expected("A third text", 9)
        XCTAssertEqual(session.written, alone)
    }

    @MainActor func testStops() async throws {
        let shelf = StateShelf(folder: states)
        let states = try await saved(["Once", "Twice"], shelf)
        let gate = Gate(after: 6)
        let comparison = Comparison(
            states, generator: try generator { await gate.pass() }, shelf: shelf, tokensPerTurn: 4)
        comparison.start("", options: TTTOptions(maxTokens: 1000))
        await gate.reached()
        comparison.stop()
        await gate.open()
        await comparison.finish()
        XCTAssertFalse(comparison.isWriting)
        XCTAssertNil(comparison.problem)
        XCTAssertLessThan(comparison.sides.map(\.text.count).reduce(0, +), 20)
    }

    @MainActor func testErrorsAreShown() async throws {
        let shelf = StateShelf(folder: states)
        let states = try await saved(["Once", "Twice"], shelf)
        try FileManager.default.removeItem(at: shelf.file(of: states[1]))
        let comparison = Comparison(states, generator: try generator(), shelf: shelf)
        comparison.start("", options: TTTOptions(maxTokens: 10))
        await comparison.finish()
        guard case .other(let text)? = comparison.problem else { return XCTFail("no problem") }
        XCTAssertTrue(text.contains(".state cannot be read"), text)
        XCTAssertFalse(comparison.isWriting)
    }
}
