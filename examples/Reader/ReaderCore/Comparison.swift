import Foundation
import Observation
import TTTKit

/// Two states side by side: both go on with the same prompt, in turns on one model.
@MainActor
@Observable
final class Comparison: Identifiable {
    struct Side: Identifiable, Equatable {
        let id: Int
        let title: String
        var text = ""
        var isFinished = false
    }

    private(set) var sides: [Side]
    private(set) var isWriting = false
    private(set) var problem: Problem?

    private let generator: TTTGenerator
    private let files: [URL]
    private let tokensPerTurn: Int
    private var task: Task<Void, Never>?

    /// - Parameter tokensPerTurn: how many tokens a side writes before the other does.
    init(_ states: [SavedState], generator: TTTGenerator, shelf: StateShelf, tokensPerTurn: Int = 16) {
        sides = states.enumerated().map { Side(id: $0, title: $1.title) }
        files = states.map { shelf.file(of: $0) }
        self.generator = generator
        self.tokensPerTurn = tokensPerTurn
    }

    /// Each side begins at its state again. At the end the generator is back at the text that it was at.
    func start(_ prompt: String, options: TTTOptions) {
        guard task == nil else { return }
        (isWriting, problem) = (true, nil)
        for side in sides.indices { (sides[side].text, sides[side].isFinished) = (prompt, false) }
        task = Task {
            do {
                let before = try await generator.state()
                do {
                    try await write(prompt, options)
                } catch {
                    problem = Problem(error)
                }
                try await generator.restore(before)
            } catch {
                problem = Problem(error)
            }
            isWriting = false
            task = nil
        }
    }

    func stop() {
        task?.cancel()
    }

    /// Until nothing runs.
    func finish() async {
        await task?.value
    }

    private func write(_ prompt: String, _ options: TTTOptions) async throws {
        var states: [TextState] = []
        for file in files { states.append(try await Task.detached { try TextState(contentsOf: file) }.value) }
        var left = options.maxTokens
        var prompt = prompt
        while left > 0, sides.contains(where: { !$0.isFinished }) {
            var options = options
            options.maxTokens = min(tokensPerTurn, left)
            for side in sides.indices where !sides[side].isFinished {
                try Task.checkCancellation()
                try await generator.restore(states[side])
                for try await piece in generator.generate(prompt, options: options) { sides[side].text += piece }
                sides[side].isFinished = await generator.stop != .length
                states[side] = try await generator.state()
            }
            left -= options.maxTokens
            prompt = ""
        }
        for side in sides.indices { sides[side].isFinished = true }
    }
}
