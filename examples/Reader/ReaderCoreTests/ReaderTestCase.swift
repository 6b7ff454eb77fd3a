import Foundation
import TTTKit
import XCTest

@testable import ReaderCore

/// A folder for each test, and what most of them need.
class ReaderTestCase: XCTestCase {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("reader-\(UUID().uuidString)")

    override func setUpWithError() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: folder)
    }

    func write(_ text: String, to name: String) throws -> URL {
        let file = folder.appendingPathComponent(name)
        try Data(text.utf8).write(to: file)
        return file
    }

    var states: URL { folder.appendingPathComponent("states") }
}

func generator(failsAtCall: Int? = nil, pace: @escaping @Sendable () async -> Void = {}) throws -> TTTGenerator {
    TTTGenerator(model: try FakeModel(failsAtCall: failsAtCall, pace: pace), tokenizer: ByteTokenizer())
}

/// What a fresh model writes after this text.
func expected(_ text: String, _ maxTokens: Int) async throws -> String {
    var written = ""
    for try await piece in try generator().generate(text, options: TTTOptions(maxTokens: maxTokens)) {
        written += piece
    }
    return written
}

/// Holds a model's calls after so many, until it is opened.
actor Gate {
    private var calls = 0
    private let free: Int
    private var isOpen = false
    private var waiting: [CheckedContinuation<Void, Never>] = []
    private var watching: [CheckedContinuation<Void, Never>] = []

    init(after calls: Int) { free = calls }

    func pass() async {
        calls += 1
        guard calls > free, !isOpen else { return }
        watching.forEach { $0.resume() }
        watching = []
        await withCheckedContinuation { waiting.append($0) }
    }

    /// Until a call is held.
    func reached() async {
        if waiting.isEmpty { await withCheckedContinuation { watching.append($0) } }
    }

    func open() {
        isOpen = true
        waiting.forEach { $0.resume() }
        waiting = []
    }
}
