import TTTFormats
import XCTest

@testable import TTTKit

final class TTTGeneratorTests: XCTestCase {
    private func makeGenerator(_ model: FakeModel) -> TTTGenerator {
        TTTGenerator(model: model, tokenizer: ByteTokenizer())
    }

    // MARK: - Blocks

    func testReadsAPromptInBlocksAndItsTailInOneCall() async throws {
        let model = mixing(try .test())
        _ = try await makeGenerator(model).text("0123456789012345678", maxTokens: 2)  // 20 tokens with BOS
        let calls = await model.calls
        XCTAssertEqual(calls, [.prefill(length: 8), .prefill(length: 8), .prefill(length: 4), .decode(position: 0)])
    }

    func testGoesOnInsideAMiniBatchByStepsToItsEnd() async throws {
        let model = mixing(try .test())
        let generator = makeGenerator(model)
        try await generator.read("01")  // 3 tokens, the last one stays unread
        try await generator.read("2345678")
        let calls = await model.calls
        XCTAssertEqual(
            calls, [.prefill(length: 2), .decode(position: 2), .decode(position: 3), .prefill(length: 5)])
        let position = await generator.position
        XCTAssertEqual(position, 9)
    }

    func testReadsASingleTokenAtTheStartOfAMiniBatchByAStep() async throws {
        let model = mixing(try .test())
        _ = try await makeGenerator(model).text("012", maxTokens: 2)  // 4 tokens with BOS
        let calls = await model.calls
        XCTAssertEqual(calls, [.prefill(length: 4), .decode(position: 0)])
    }

    func testRefusesAnEmptyText() async throws {
        let generator = makeGenerator(mixing(try .test()))
        await assertThrows(.emptyPrompt) { try await generator.text("", maxTokens: 1) }
    }

    func testWritesTheSameHoweverTheTextIsSplitIntoCalls() async throws {
        let prompt = "To be, or not to be, that is the question:"
        let whole = try await makeGenerator(mixing(try .test())).text(prompt, maxTokens: 30)
        for size in [1, 3, 4, 5, 8, 11] {
            let generator = makeGenerator(mixing(try .test(prefillTokens: 4)))
            var rest = Substring(prompt)
            while rest.count > size {
                try await generator.read(String(rest.prefix(size)))
                rest = rest.dropFirst(size)
            }
            let first = try await generator.text(String(rest), maxTokens: 7)
            let second = try await generator.text(maxTokens: 23)
            XCTAssertEqual(first + second, whole, "in pieces of \(size)")
        }
    }

    // MARK: - Text

    func testStreamsWholeCharacters() async throws {
        let script = "aé€🙂z"
        let model = scripted(script, after: 2, info: try .test())
        let pieces = try await makeGenerator(model).pieces("x")
        XCTAssertEqual(pieces, ["a", "é", "€", "🙂", "z"])
    }

    func testGoesOnInTheMiddleOfACharacter() async throws {
        let generator = makeGenerator(scripted("a🙂b", after: 2, info: try .test()))
        let first = try await generator.text("x", maxTokens: 3)
        let saved = try await generator.state()
        try await generator.restore(saved)
        let second = try await generator.text(maxTokens: 3)
        XCTAssertEqual([first, second], ["a", "🙂b"])
    }

    func testStopsAtAStopStringAcrossTokens() async throws {
        let model = scripted("one, two. three", after: 2, info: try .test())
        let generator = makeGenerator(model)
        let pieces = try await generator.pieces("x", TTTOptions(stopStrings: ["two.", "never"]))
        XCTAssertEqual(pieces.joined(), "one, ")
        XCTAssertFalse(pieces.contains { $0.contains("t") })
        let rest = try await generator.pieces("", TTTOptions()).joined()
        XCTAssertEqual(rest, " three")
    }

    func testShowsWhatOnlyLookedLikeAStopString() async throws {
        let model = scripted("one, tw", after: 2, info: try .test())
        let pieces = try await makeGenerator(model).pieces("x", TTTOptions(stopStrings: ["two."]))
        XCTAssertEqual(pieces.joined(), "one, tw")
    }

    func testStopsAtAnEndToken() async throws {
        let model = scripted("done", after: 2, info: try .test())
        let generator = makeGenerator(model)
        let text = try await generator.text("x", maxTokens: 100)
        XCTAssertEqual(text, "done")
        let ended = try await generator.pieces("", TTTOptions(maxTokens: 3, endTokens: [])).joined()
        XCTAssertEqual(ended, "")
    }

    // MARK: - Stopping from outside

    func testLeavingTheLoopLeavesATextToContinue() async throws {
        let generator = makeGenerator(mixing(try .test()))
        for try await _ in generator.generate("x", options: TTTOptions(maxTokens: 1_000_000)) { break }
        let shown = await generator.position
        _ = try await generator.text(maxTokens: 5)
        let position = await generator.position
        XCTAssertGreaterThanOrEqual(position, shown)
        XCTAssertLessThan(position, 1_000_000)
    }

    func testCancellationWhileReadingLosesNoToken() async throws {
        let model = mixing(try .test())
        let generator = makeGenerator(model)
        let reading = Task {
            withUnsafeCurrentTask { task in
                if let task { task.cancel() }
            }
            try await generator.read("0123456789")
        }
        do {
            try await reading.value
            XCTFail("no error")
        } catch {
            XCTAssertTrue(error is CancellationError)
        }
        let continued = try await generator.text("abc", maxTokens: 9)
        let whole = try await makeGenerator(mixing(try .test())).text("0123456789abc", maxTokens: 9)
        XCTAssertEqual(continued, whole)
    }

    /// For the thread sanitizer: everything at once, and the text is one that can be continued at the end.
    func testCancelsAndRestartsFromManyTasks() async throws {
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("Once")
        let saved = try await generator.state()
        await withTaskGroup(of: Void.self) { group in
            for i in 0..<200 {
                group.addTask {
                    switch i % 7 {
                    case 0:
                        do {
                            for try await _ in generator.generate("a", options: TTTOptions(maxTokens: 50)) { break }
                        } catch {}  // emptyPrompt, stateLost: whatever the others have just done
                    case 1:
                        let task = Task { try await generator.text("b", maxTokens: 50) }
                        if i % 2 == 0 { await Task.yield() }
                        task.cancel()
                        _ = try? await task.value
                    case 2:
                        let task = Task { try await generator.read("0123456789") { _, _ in } }
                        task.cancel()
                        _ = try? await task.value
                    case 3: _ = try? await generator.state()
                    case 4: _ = try? await generator.restore(saved)
                    case 5: try? await generator.reset()
                    default:
                        await generator.giveBackMemory()
                        _ = await (generator.position, generator.speed, generator.stop, generator.unreadTokens)
                    }
                }
            }
        }
        await generator.settle()
        try await generator.restore(saved)
        let text = try await generator.text(" upon", maxTokens: 9)
        let whole = try await makeGenerator(mixing(try .test())).text("Once upon", maxTokens: 9)
        XCTAssertEqual(text, whole)
    }

    func testSaysWhyItStopped() async throws {
        let generator = makeGenerator(scripted("one, two", after: 2, info: try .test()))
        let none = await generator.stop
        XCTAssertNil(none)
        for (options, expected) in [
            (TTTOptions(maxTokens: 2), TTTStop.length), (TTTOptions(stopStrings: [", "]), .stopString),
            (TTTOptions(), .endToken),
        ] {
            _ = try await generator.pieces(expected == .length ? "x" : "", options)
            let stop = await generator.stop
            XCTAssertEqual(stop, expected)
        }
    }

    func testCallsTakeTurns() async throws {
        let generator = makeGenerator(mixing(try .test()))
        async let first = generator.text("first", maxTokens: 50)
        async let second = generator.text("second", maxTokens: 50)
        let lengths = try await [first.count, second.count]
        XCTAssertEqual(lengths, [50, 50])
    }

    // MARK: - Saved states

    func testASavedTextGoesOnTheSame() async throws {
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("Once upon a time")
        let saved = try await generator.state()
        let expected = try await generator.text(" there", maxTokens: 20)

        let other = makeGenerator(mixing(try .test()))
        for _ in 0..<2 {
            try await other.restore(saved)
            let continued = try await other.text(" there", maxTokens: 20)
            XCTAssertEqual(continued, expected)
        }
    }

    func testASavedStateOfAnotherModelIsRefused() async throws {
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("Once")
        let saved = try await generator.state()
        let other = makeGenerator(mixing(try .test(fingerprint: "b")))
        await assertThrows(.stateOfAnotherModel) { try await other.restore(saved) }
    }

    func testAStateThatContradictsItselfIsRefused() async throws {
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("Once")
        let saved = try await generator.state()
        for change in [
            { (state: inout TextState) in state.tokens.append(258) }, { $0.tokens = [] }, { $0.pending = [-1] },
        ] {
            var wrong = saved
            change(&wrong)
            let state = wrong
            await assertThrows(.damagedState) { try await generator.restore(state) }
        }
        let text = try await generator.text(maxTokens: 3)  // as it was
        try await generator.restore(saved)
        let again = try await generator.text(maxTokens: 3)
        XCTAssertEqual(text, again)
    }

    func testAStateOfOtherWeightsIsTakenWithAWarning() async throws {
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("Once")
        var saved = try await generator.state()
        let none = try await generator.restore(saved)
        XCTAssertEqual(none, [])
        saved.weights = "int8"
        let warnings = try await generator.restore(saved)
        XCTAssertEqual(warnings.count, 1)
        XCTAssertTrue(warnings[0].contains("int8") && warnings[0].contains("float32"), warnings[0])
    }

    func testWhatACancelledCallHasLeftIsInTheState() async throws {
        let generator = makeGenerator(mixing(try .test()))
        let reading = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            try await generator.read("0123456789")
        }
        _ = try? await reading.value
        let saved = try await generator.state()
        XCTAssertEqual(saved.tokens + saved.pending, ByteTokenizer().encode("0123456789", addingSpecialTokens: true))
        let other = makeGenerator(mixing(try .test()))
        try await other.restore(saved)
        let text = try await other.text("abc", maxTokens: 9)
        let whole = try await makeGenerator(mixing(try .test())).text("0123456789abc", maxTokens: 9)
        XCTAssertEqual(text, whole)
    }

    func testProgressIsThatOfThePrompt() async throws {
        let seen = Seen()
        let generator = makeGenerator(mixing(try .test()))
        try await generator.read("0123456789012345678") { done, total in seen.append([done, total]) }
        XCTAssertEqual(seen.all, [[8, 19], [16, 19], [19, 19]])
    }

    func testAFailedCallAsksForAState() async throws {
        let model = mixing(try .test())
        let generator = makeGenerator(model)
        try await generator.read("Once")
        let saved = try await generator.state()
        let calls = await model.calls.count
        await model.fail(atCall: calls + 3)
        do {
            _ = try await generator.text(" upon a time", maxTokens: 5)
            XCTFail("no error")
        } catch {
            XCTAssertTrue(error is FakeModel.Failure)
        }
        await assertThrows(.stateLost) { try await generator.read("more") }
        await assertThrows(.stateLost) { try await generator.state() }
        try await generator.restore(saved)
        _ = try await generator.text(" upon", maxTokens: 5)
        try await generator.reset()
        let text = try await generator.text("Once", maxTokens: 5)
        let fresh = try await makeGenerator(mixing(try .test())).text("Once", maxTokens: 5)
        XCTAssertEqual(text, fresh)
    }

    // MARK: - Bad input

    func testRefusesATokenOutsideTheVocabulary() async throws {
        let generator = makeGenerator(mixing(try .test(vocabularySize: 100)))
        await assertThrows(.tokenOutsideVocabulary(256, size: 100)) { try await generator.read("x") }
    }

    func testRefusesOptionsOutsideTheirRange() async throws {
        let generator = makeGenerator(mixing(try .test()))
        let wrong = [
            TTTOptions(maxTokens: 0), TTTOptions(temperature: -1), TTTOptions(temperature: .nan),
            TTTOptions(topK: -1), TTTOptions(topP: 0), TTTOptions(topP: 1.5), TTTOptions(minP: 2),
        ]
        for options in wrong {
            do {
                _ = try await generator.pieces("x", options)
                XCTFail("no error for \(options)")
            } catch {
                guard case .invalidOption = error as? TTTError else {
                    XCTFail("\(error)")
                    continue
                }
            }
        }
    }
}

private final class Seen: @unchecked Sendable {
    private let lock = NSLock()
    private var items: [[Int]] = []

    func append(_ item: [Int]) { lock.withLock { items.append(item) } }

    var all: [[Int]] { lock.withLock { items } }
}

private func assertThrows<T>(_ expected: TTTError, line: UInt = #line, _ body: () async throws -> T) async {
    do {
        _ = try await body()
        XCTFail("no error", line: line)
    } catch {
        XCTAssertEqual(error as? TTTError, expected, line: line)
    }
}
