import TTTKit
import XCTest

@testable import ReaderCore

final class ReadingSessionTests: ReaderTestCase {
    @MainActor private func session(_ generator: TTTGenerator, maxTokens: Int = 12) -> ReadingSession {
        ReadingSession(
            generator: generator, shelf: StateShelf(folder: states), options: TTTOptions(maxTokens: maxTokens))
    }

    @MainActor func testReadsABookAndGoesOn() async throws {
        let session = session(try generator())
        XCTAssertFalse(session.canGoOn)
        session.open(Book(file: try write("Once upon a time\n", to: "Tale.txt")))
        XCTAssertFalse(session.isResting)
        await session.finish()
        XCTAssertEqual(session.title, "Tale")
        XCTAssertEqual(session.tokens, 16)  // the last of 17 waits for the next call
        XCTAssertTrue(session.canGoOn)
        session.goOn()
        await session.finish()
        let all = try await expected("Once upon a time", 12)
        XCTAssertEqual(session.written, all)
        XCTAssertNil(session.problem)
        session.goOn(after: " And")
        await session.finish()
        XCTAssertTrue(session.written.hasPrefix(all + " And"))
        XCTAssertEqual(session.written.count, 12 + 4 + 12)
    }

    @MainActor func testShowsProgress() async throws {
        let gate = Gate(after: 2)
        let session = session(try generator { await gate.pass() })
        session.open(Book(file: try write(String(repeating: "x", count: 40), to: "Long.txt")))
        await gate.reached()
        for _ in 0..<5000 where session.activity != .reading(done: 16, total: 40) {
            try await Task.sleep(for: .milliseconds(1))
        }
        XCTAssertEqual(session.activity, .reading(done: 16, total: 40))
        await gate.open()
        await session.finish()
        XCTAssertEqual(session.activity, .resting)
        XCTAssertEqual(session.tokens, 40)
    }

    @MainActor func testStoppedReadingIsTakenUpAgain() async throws {
        let gate = Gate(after: 2)
        let text = String(repeating: "abc", count: 20)
        let session = session(try generator { await gate.pass() })
        session.open(Book(file: try write(text, to: "Long.txt")))
        await gate.reached()
        session.stop()
        await gate.open()
        await session.finish()
        XCTAssertNil(session.problem)  // a person has asked for it
        XCTAssertEqual(session.tokens, 24)
        XCTAssertEqual(session.unreadTokens, 60 - 24)
        session.readOn()
        await session.finish()
        XCTAssertEqual([session.tokens, session.unreadTokens], [60, 0])
        session.goOn()
        await session.finish()
        let whole = try await expected(text, 12)
        XCTAssertEqual(session.written, whole)
    }

    @MainActor func testStoppedWritingLeavesAStateThatGoesOn() async throws {
        let gate = Gate(after: 4)
        let model: @Sendable () async -> Void = {
            await gate.pass()
            await MainActor.run {}  // a call takes long enough for the session to notice that it shall stop
        }
        let session = session(try generator(pace: model), maxTokens: 1000)
        session.open(Book(file: try write("Once", to: "Tale.txt")))
        await session.finish()
        session.goOn()
        await gate.reached()
        session.stop()
        await gate.open()
        await session.finish()
        XCTAssertLessThan(session.written.count, 1000)
        XCTAssertTrue(session.isResting)
        session.options.maxTokens = 3
        session.goOn()
        await session.finish()
        XCTAssertNil(session.problem)
    }

    @MainActor func testOneThingAtATime() async throws {
        let gate = Gate(after: 0)
        let session = session(try generator { await gate.pass() })
        session.open(Book(file: try write("Once upon", to: "Tale.txt")))
        await gate.reached()
        session.goOn()
        session.remember(as: "No")
        XCTAssertNotEqual(session.activity, .writing)
        await gate.open()
        await session.finish()
        XCTAssertEqual(session.written, "")
        XCTAssertEqual(StateShelf(folder: states).states, [])
    }

    @MainActor func testRemembersAndRecalls() async throws {
        let shelf = StateShelf(folder: states)
        let session = ReadingSession(generator: try generator(), shelf: shelf, options: TTTOptions(maxTokens: 5))
        session.open(Book(file: try write("Once upon a time", to: "Tale.txt")))
        await session.finish()
        session.remember(as: "The beginning")
        await session.finish()
        XCTAssertEqual(shelf.states.map(\.title), ["The beginning"])
        XCTAssertEqual(shelf.states.first?.tokens, 16)
        session.goOn()
        await session.finish()
        let first = session.written

        let other = ReadingSession(
            generator: try generator(), shelf: StateShelf(folder: states), options: TTTOptions(maxTokens: 5))
        other.recall(try XCTUnwrap(shelf.states.first))
        await other.finish()
        XCTAssertEqual([other.title, other.written], ["The beginning", ""])
        other.goOn()
        await other.finish()
        XCTAssertEqual(other.written, first)
        XCTAssertEqual(other.warnings, [])

        shelf.remove(try XCTUnwrap(shelf.states.first))
        XCTAssertEqual(shelf.states, [])
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: states.path), [])
    }

    @MainActor func testTheSessionSurvivesTheBackground() async throws {
        let gate = Gate(after: 1)
        let shelf = StateShelf(folder: states)
        let session = ReadingSession(generator: try generator { await gate.pass() }, shelf: shelf)
        await session.enterBackground()
        XCTAssertEqual(shelf.states, [])  // there is nothing to keep
        session.open(Book(file: try write(String(repeating: "abc", count: 20), to: "Long.txt")))
        await gate.reached()
        Task { await gate.open() }
        await session.enterBackground()
        let kept = try XCTUnwrap(shelf.states.first)
        XCTAssertEqual([kept.title, kept.id.uuidString], ["Long", ReadingSession.lastSession.uuidString])
        await session.enterBackground()
        XCTAssertEqual(StateShelf(folder: states).states.count, 1)  // the same one, not another

        let next = ReadingSession(generator: try generator(), shelf: shelf, options: TTTOptions(maxTokens: 7))
        next.recall(kept)
        await next.finish()
        XCTAssertGreaterThan(next.unreadTokens, 0)
        next.goOn()
        await next.finish()
        let whole = try await expected(String(repeating: "abc", count: 20), 7)
        XCTAssertEqual(next.written, whole)
    }

    @MainActor func testErrorsAreShown() async throws {
        let shelf = StateShelf(folder: states)
        let session = ReadingSession(generator: try generator(failsAtCall: 2), shelf: shelf)
        session.open(Book(file: folder.appendingPathComponent("nowhere.txt")))
        await session.finish()
        XCTAssertEqual(session.problem, .reader(.unreadableFile("nowhere.txt")))
        session.open(Book(file: try write("Once upon a time", to: "Tale.txt")))
        await session.finish()
        XCTAssertNotNil(session.problem)
        session.goOn()
        await session.finish()
        XCTAssertEqual(session.problem, .other(TTTError.stateLost.localizedDescription))
        session.open(Book(file: try write("Once upon a time", to: "Tale.txt")))  // a fresh start is one
        await session.finish()
        XCTAssertNil(session.problem)

        let damaged = SavedState(id: UUID(), title: "Damaged", tokens: 1, date: Date())
        try FileManager.default.createDirectory(at: states, withIntermediateDirectories: true)
        try Data("{}".utf8).write(to: shelf.file(of: damaged))
        session.recall(damaged)
        await session.finish()
        XCTAssertEqual(session.problem, .other(TTTError.notAState.localizedDescription))
        XCTAssertEqual(session.title, "Tale")
        session.goOn()
        await session.finish()
        XCTAssertNil(session.problem)
    }

    @MainActor func testMemoryIsGivenBack() async throws {
        let model = try FakeModel()
        let session = session(TTTGenerator(model: model, tokenizer: ByteTokenizer()))
        await session.memoryWarning()
        let times = await model.gaveBack
        XCTAssertEqual(times, 1)
    }

    @MainActor func testANoteWithoutAStateIsNotShown() async throws {
        let shelf = StateShelf(folder: states)
        let generator = try generator()
        try await generator.read("Once")
        let state = try await shelf.save(generator, title: "One")
        try FileManager.default.removeItem(at: shelf.file(of: state))
        shelf.refresh()
        XCTAssertEqual(shelf.states, [])
    }
}
