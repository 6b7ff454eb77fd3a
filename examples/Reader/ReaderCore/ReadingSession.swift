import Foundation
import Observation
import TTTKit

/// A text being read and continued: what a page of the app shows, and what can be done there.
@MainActor
@Observable
final class ReadingSession {
    enum Activity: Equatable {
        case resting
        /// Tokens read of so many.
        case reading(done: Int, total: Int)
        case writing
        /// A state is saved or loaded.
        case working
    }

    private(set) var activity = Activity.resting
    private(set) var title = ""
    /// What the model has written since the book or the state was opened.
    private(set) var written = ""
    /// Tokens that the model has read or written.
    private(set) var tokens = 0
    /// Tokens of the book that are left because reading was stopped.
    private(set) var unreadTokens = 0
    private(set) var tokensPerSecond = 0.0
    private(set) var warnings: [String] = []
    private(set) var problem: Problem?
    var options: TTTOptions

    private let generator: TTTGenerator
    private let shelf: StateShelf
    private var task: Task<Void, Never>?
    /// Which task reports progress; that of an earlier one is not shown.
    private var turn = 0

    /// The state that is kept when the app leaves the screen.
    static let lastSession = UUID(uuid: (0, 0, 0, 0, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, 1))

    init(generator: TTTGenerator, shelf: StateShelf, options: TTTOptions = TTTOptions()) {
        self.generator = generator
        self.shelf = shelf
        self.options = options
    }

    var isResting: Bool { activity == .resting }
    var canGoOn: Bool { isResting && tokens > 0 }

    // MARK: - What a person does

    /// Forgets the text and reads another.
    func open(_ book: Book) {
        begin(.reading(done: 0, total: 1)) { session, turn in
            session.title = book.title
            session.written = ""
            let text = try await Task.detached { try book.text() }.value
            try await session.generator.reset()
            try await session.generator.read(text, progress: session.progress(turn))
        }
    }

    /// Reads what is left of a book after `stop`.
    func readOn() {
        begin(.reading(done: 0, total: max(unreadTokens, 1))) { session, turn in
            try await session.generator.read("", progress: session.progress(turn))
        }
    }

    /// Has the model write on, after more text if there is any.
    func goOn(after prompt: String = "") {
        begin(.writing) { session, _ in
            session.written += prompt
            for try await piece in session.generator.generate(prompt, options: session.options) {
                session.written += piece
            }
            session.tokensPerSecond = await session.generator.speed.tokensPerSecond
        }
    }

    /// Reading and writing end where they are. Nothing is lost.
    func stop() {
        task?.cancel()
    }

    /// Keeps the state under a name.
    func remember(as name: String) {
        begin(.working) { session, _ in try await session.shelf.save(session.generator, title: name) }
    }

    /// Goes back to a state.
    func recall(_ state: SavedState) {
        begin(.working) { session, _ in
            session.warnings = try await session.generator.load(from: session.shelf.file(of: state))
            (session.title, session.written) = (state.title, "")
        }
    }

    /// Sets two states side by side. What this session has read stays.
    func comparison(of states: [SavedState]) -> Comparison {
        Comparison(states, generator: generator, shelf: shelf)
    }

    // MARK: - What the system does

    /// Stops, and keeps the state. Call it while the system still gives time.
    func enterBackground() async {
        stop()
        await finish()
        guard tokens > 0 else { return }
        begin(.working) { session, _ in
            try await session.shelf.save(session.generator, title: session.title, id: Self.lastSession)
        }
        await finish()
    }

    /// Gives back memory that is not needed until the next prompt.
    func memoryWarning() async {
        await generator.giveBackMemory()
    }

    /// Until nothing runs.
    func finish() async {
        await task?.value
    }

    // MARK: - Turns

    /// One thing at a time: what is asked for while something runs is left out.
    private func begin(
        _ activity: Activity, _ work: @escaping @MainActor (ReadingSession, Int) async throws -> Void
    ) {
        guard task == nil else { return }
        (self.activity, problem, warnings) = (activity, nil, [])
        turn += 1
        let turn = turn
        task = Task {
            do {
                try await work(self, turn)
            } catch {
                problem = Problem(error)
            }
            await generator.settle()
            tokens = await generator.position
            unreadTokens = await generator.unreadTokens
            self.activity = .resting
            task = nil
        }
    }

    /// Called from wherever the model runs.
    private nonisolated func progress(_ turn: Int) -> TTTGenerator.Progress {
        { done, total in
            Task { @MainActor in self.show(done, of: total, in: turn) }
        }
    }

    private func show(_ done: Int, of total: Int, in turn: Int) {
        guard turn == self.turn, case .reading(let before, _) = activity, done > before else { return }
        activity = .reading(done: done, total: total)
    }
}
