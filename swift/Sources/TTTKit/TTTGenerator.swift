import Foundation

/// Continues a text: reads prompts, samples tokens, streams text; gives what has been read and takes it up again.
///
/// There is one text at a time. Calls that overlap take turns.
public actor TTTGenerator {
    private let model: any TTTModel
    private let tokenizer: any TTTTokenizer

    /// Tokens of the text that the model has read.
    public private(set) var position = 0
    /// How fast the last call was.
    public private(set) var speed = TTTSpeed()
    /// Why the last call stopped writing; nil if it was cancelled, failed, or still runs.
    public private(set) var stop: TTTStop?
    /// Tokens of a prompt that a cancelled call has not read. The next call reads them first.
    public var unreadTokens: Int { max(unread.count - 1, 0) }
    /// The last tokens that the model has read: the detokenizer and the penalty of repetitions look back at them.
    private var context: [Int] = []
    /// The tokens after those. Between calls it is the last of the text: reading it is the first step to the next.
    private var unread: [Int] = []
    /// Whether the model's state is the one after `position` tokens.
    private var isIntact = true

    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    /// Called with the tokens that have been read of a prompt, and their number in all.
    public typealias Progress = @Sendable (Int, Int) -> Void
    /// Called with each token that the model has read, of a prompt or of what it writes, in order.
    public typealias Observer = @Sendable (TTTObservation) -> Void

    /// A text before its first token.
    ///
    /// - Parameters:
    ///   - model: which nobody else calls from now on: it keeps the state of this text.
    ///   - tokenizer: that of the model.
    public init(model: any TTTModel, tokenizer: any TTTTokenizer) {
        self.model = model
        self.tokenizer = tokenizer
    }

    /// Goes on with the text: reads the prompt, then writes.
    ///
    /// The text comes in pieces that add up to what is written: whole characters, no stop string or part of one.
    /// To stop early, leave the loop over the stream or cancel its task. The text then ends with what was written
    /// until that was noticed, which may be a few tokens more than were shown.
    ///
    /// - Parameters:
    ///   - prompt: text to read first. Empty: the text goes on where it stands.
    ///   - options: how to choose tokens, and where to stop.
    ///   - progress: of the prompt; called from wherever the model runs.
    ///   - observer: of what the model learns, `TTTError.noSignals` if it does not show it; called as `progress`. A
    ///     token that was written is read, and observed, after its piece has come, when the next token is asked for.
    /// - Returns: a stream that throws `TTTError`, `CancellationError`, or what the framework throws.
    public nonisolated func generate(
        _ prompt: String = "", options: TTTOptions = TTTOptions(), progress: Progress? = nil, observer: Observer? = nil
    ) -> AsyncThrowingStream<String, Error> {
        stream(.text(prompt), options, Listeners(progress: progress, observer: observer))
    }

    /// Who is told of what the model reads.
    private struct Listeners: Sendable {
        var progress: Progress?
        var observer: Observer?
    }

    /// What is read before something is written.
    private enum Prompt {
        case text(String)
        /// A template has put all special tokens in.
        case chat(String)
    }

    private nonisolated func stream(
        _ prompt: Prompt, _ options: TTTOptions, _ listeners: Listeners
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.write(after: prompt, options: options, listeners) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Reads text without writing any: a book, or instructions that many texts begin with.
    ///
    /// When its task is cancelled, what is left of the text is read by the next call.
    ///
    /// - Parameters:
    ///   - text: empty, to go on with what a cancelled call has left.
    ///   - progress: called from wherever the model runs, after each block.
    ///   - observer: as in `generate`.
    /// - Throws: `CancellationError`, `TTTError.emptyPrompt`, `.stateLost`, `.noSignals`, or what the framework throws.
    public func read(_ text: String, progress: Progress? = nil, observer: Observer? = nil) async throws {
        await takeTurn()
        defer { endTurn() }
        try check(observer)
        try append(.text(text))
        try await readUnread(keeping: 1, Listeners(progress: progress, observer: observer))
    }

    /// Goes on with a conversation: reads the messages as the model's template writes them, then an answer.
    ///
    /// Control tokens that the template writes count as such only if the tokenizer finds them in texts, as tokenizers with a
    /// chat template do. For the first message of a text give all messages; later, those since the last answer.
    ///
    /// - Parameters:
    ///   - messages: see above.
    ///   - template: of the tokenizer.
    ///   - options: how to choose tokens, and where to stop.
    ///   - progress: as in `generate`.
    ///   - observer: as in `generate`.
    /// - Throws: `TTTError.unsupported` for messages that the template refuses.
    public nonisolated func answer(
        _ messages: [ChatMessage], template: ChatTemplate, options: TTTOptions = TTTOptions(),
        progress: Progress? = nil, observer: Observer? = nil
    ) throws -> AsyncThrowingStream<String, Error> {
        stream(.chat(try template(messages)), options, Listeners(progress: progress, observer: observer))
    }

    /// How much the model learns from the tokens that it reads from now on: 0 freezes what it has learned, 1 is the
    /// model as it is. It is no part of the text: it stays when a state is taken up or the text is forgotten.
    ///
    /// - Throws: `TTTError.noLearningScale`, or `.invalidOption` for a number that is negative or not finite.
    public func setLearning(_ scale: Float) async throws {
        guard let shape = model.info.learningShape else { throw TTTError.noLearningScale }
        try await setLearning(Tensor(shape: shape, values: [Float](repeating: scale, count: shape.reduce(1, *))))
    }

    /// The same with a number for each layer and head: [layers, heads], as `TTTModelInfo.learningShape` says.
    public func setLearning(_ scale: Tensor) async throws {
        await takeTurn()
        defer { endTurn() }
        try await model.setLearning(scale)
    }

    /// Waits until the calls that were made before have ended: one that was cancelled ends a little later.
    public func settle() async {
        await takeTurn()
        endTurn()
    }

    /// Gives back memory that is not needed before the next prompt; for memory warnings. The text stays as it is.
    public func giveBackMemory() async {
        await takeTurn()
        defer { endTurn() }
        await model.giveBackMemory()
    }

    /// Forgets the text.
    public func reset() async throws {
        await takeTurn()
        defer { endTurn() }
        isIntact = false
        try await model.reset()
        (position, context, unread, isIntact) = (0, [], [], true)
    }

    // MARK: - The state

    /// The text as it stands, which is as large however long it is. A branch: this text goes on without it.
    ///
    /// - Throws: `TTTError.stateLost` after a call that failed midway.
    public func state() async throws -> TextState {
        await takeTurn()
        defer { endTurn() }
        guard isIntact else { throw TTTError.stateLost }
        return TextState(
            layers: try await model.state(position: position), tokens: context + unread.prefix(1),
            pending: Array(unread.dropFirst()), fingerprint: model.info.fingerprint, weights: model.info.weights)
    }

    /// Goes back to a state.
    ///
    /// - Returns: what a person should know, such as that the state was made with other weights of the same model.
    /// - Throws: `TTTError.stateOfAnotherModel`; then the text stays as it was.
    @discardableResult
    public func restore(_ state: TextState) async throws -> [String] {
        await takeTurn()
        defer { endTurn() }
        let info = model.info
        guard state.fingerprint == info.fingerprint else { throw TTTError.stateOfAnotherModel }
        let tokens = state.tokens + state.pending
        guard tokens.allSatisfy({ (0..<info.vocabularySize).contains($0) }),
            state.tokens.isEmpty == (state.position == 0 && tokens.isEmpty)
        else { throw TTTError.damagedState }
        try await model.restore(state.layers)
        position = state.position
        context = Array(state.tokens.dropLast())
        unread = state.tokens.suffix(1) + state.pending
        isIntact = true
        guard let weights = state.weights, weights != info.weights else { return [] }
        return ["The state was made with \(weights) weights and goes on with \(info.weights): the text may differ a little."]
    }

    /// Writes the state to a file that `mlx_ttt.load_state` reads. An older file stays whole until the new one is, also
    /// if the app is killed meanwhile.
    ///
    /// - Throws: `TTTError.unwritableFile`, `.stateLost`.
    public func save(to file: URL) async throws {
        let state = try await state()
        do {
            try WholeFile.write(StateFile.encoded(state), to: file)
        } catch {
            throw TTTError.unwritableFile(file.lastPathComponent, error.localizedDescription)
        }
    }

    /// Goes back to a state that `save` or Python's `mlx_ttt.save_state` wrote.
    ///
    /// - Returns: see `restore`.
    @discardableResult
    public func load(from file: URL) async throws -> [String] {
        try await restore(TextState(contentsOf: file))
    }

    // MARK: - Reading and writing

    private func write(
        after prompt: Prompt, options: TTTOptions, _ listeners: Listeners, show: @Sendable (String) -> Void
    ) async throws {
        try options.check()
        try check(listeners.observer)
        await takeTurn()
        defer { endTurn() }
        (speed, stop) = (TTTSpeed(), nil)
        let started = Date()
        try append(prompt)
        let endTokens = options.endTokens ?? model.info.endTokens
        var sampler = Sampler(options)
        var text = TextStream(stopStrings: options.stopStrings)
        var detokenizer = Detokenizer(tokenizer, context: context + unread)
        speed.promptTokens = unread.count
        for count in 1...options.maxTokens {
            let logits = try await readUnread(listeners)
            let now = Date()
            if count == 1 { speed.promptSeconds = now.timeIntervalSince(started) }
            let token: Int
            do {
                token = try sampler.next(logits, after: context)
            } catch {
                isIntact = false  // a state that gives such logits is not worth saving
                throw error
            }
            unread = [token]
            speed.tokens = count
            speed.seconds = now.timeIntervalSince(started) - speed.promptSeconds
            if endTokens.contains(token) {
                stop = .endToken
                break
            }
            let piece = text.append(detokenizer.append(token))
            if !piece.isEmpty { show(piece) }
            if text.isStopped {
                stop = .stopString
                return
            }
        }
        let rest = text.finish()
        if !rest.isEmpty { show(rest) }
        stop = stop ?? .length
    }

    private func check(_ observer: Observer?) throws {
        guard observer == nil || model.info.givesSignals else { throw TTTError.noSignals }
    }

    /// Puts text behind what is there, for the model to read.
    private func append(_ prompt: Prompt) throws {
        guard isIntact else { throw TTTError.stateLost }
        let tokens = try tokens(of: prompt)
        let size = model.info.vocabularySize
        if let stranger = tokens.first(where: { !(0..<size).contains($0) }) {
            throw TTTError.tokenOutsideVocabulary(stranger, size: size)
        }
        guard !(unread.isEmpty && tokens.isEmpty) else { throw TTTError.emptyPrompt }
        unread += tokens
    }

    private func tokens(of prompt: Prompt) throws -> [Int] {
        let isStart = position == 0 && unread.isEmpty
        switch prompt {
        case .text(""), .chat(""): return []
        case .text(let text) where isStart: return try tokenizer.encode(text, addingSpecialTokens: true)
        case .chat(let text) where isStart: return try tokenizer.encode(text, addingSpecialTokens: false)
        case .text(let text), .chat(let text): return try tokenizer.encodeMiddle(text)
        }
    }

    /// Has the model read what is unread, up to the last `kept` tokens: single steps to the next mini-batch, then
    /// blocks.
    ///
    /// - Returns: logits of what follows the last token read; none if there was nothing to read.
    @discardableResult
    private func readUnread(keeping kept: Int = 0, _ listeners: Listeners) async throws -> [Float] {
        let info = model.info
        let total = unread.count - kept
        var logits: [Float] = []
        var done = 0
        defer {
            context = (context + unread.prefix(done)).suffix(Sampler.lookBack)
            unread.removeFirst(done)
        }
        while done < total {
            try Task.checkCancellation()
            let phase = position % info.miniBatchSize
            let count = phase == 0 ? min(total - done, info.prefillTokens) : 1
            isIntact = false
            if count == 1 {
                logits = try await model.decode(unread[done], position: phase)
            } else {
                let padding = [Int](repeating: 0, count: info.prefillTokens - count)
                let block = Array(unread[done..<(done + count)]) + padding
                logits = try await model.prefill(block, length: count)
            }
            isIntact = true
            let tokens = unread[done..<done + count]
            position += count
            done += count
            if let observer = listeners.observer {
                let signals = try await model.signals()
                guard signals.count == count else {
                    throw TTTError.unexpectedOutput("the signals of \(signals.count) tokens, expected \(count)")
                }
                for (index, (token, seen)) in zip(tokens, signals).enumerated() {
                    observer(TTTObservation(token: token, position: position - count + index, signals: seen))
                }
            }
            if total > 1 { listeners.progress?(done, total) }
        }
        return logits
    }

    // An actor lets other calls in while one waits for the model, so they have to queue.

    private func takeTurn() async {
        guard isBusy else {
            isBusy = true
            return
        }
        await withCheckedContinuation { waiting.append($0) }
    }

    private func endTurn() {
        if waiting.isEmpty {
            isBusy = false
        } else {
            waiting.removeFirst().resume()
        }
    }
}

/// What the model did with a token that it has read.
public struct TTTObservation: Sendable, Equatable {
    /// Its id.
    public let token: Int
    /// Tokens of the text before it.
    public let position: Int
    /// Of all layers and heads.
    public let signals: TTTSignals
}

/// Why a text ended.
public enum TTTStop: Sendable, Equatable {
    /// `TTTOptions.maxTokens` are written.
    case length
    /// The model wrote one of the tokens at which texts end.
    case endToken
    /// A text of `TTTOptions.stopStrings` came.
    case stopString
}

/// How fast a text was read and written.
public struct TTTSpeed: Sendable, Equatable {
    /// Tokens of the prompt.
    public internal(set) var promptTokens = 0
    /// Seconds until the first new token.
    public internal(set) var promptSeconds = 0.0
    /// New tokens.
    public internal(set) var tokens = 0
    /// Seconds between the first new token and the last.
    public internal(set) var seconds = 0.0

    /// New tokens a second, the first aside, which the prompt has cost; 0 for less than two.
    public var tokensPerSecond: Double { seconds > 0 ? Double(tokens - 1) / seconds : 0 }
}
