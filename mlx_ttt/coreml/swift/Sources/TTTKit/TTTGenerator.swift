import Foundation

/// Continues a text: reads prompts, samples tokens, streams text; saves what has been read and takes it up again.
///
/// There is one text at a time. Calls that overlap take turns.
public actor TTTGenerator {
    private let model: any TTTModel
    private let tokenizer: any TTTTokenizer

    /// Tokens of the text that the model has read.
    public private(set) var position = 0
    /// The tokens after those. Between calls it is the last of the text: reading it is the first step to the next.
    private var unread: [Int] = []
    /// The start of a character at the end of the text.
    private var partialCharacter: [UInt8] = []
    /// Whether the model's state is the one after `position` tokens.
    private var isIntact = true

    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

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
    /// - Parameter prompt: text to read first. Empty: the text goes on where it stands.
    public nonisolated func generate(
        _ prompt: String = "", options: TTTOptions = TTTOptions()
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.write(after: prompt, options: options) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Reads text without writing any: a book, or instructions that many texts begin with, to be saved.
    public func read(_ text: String) async throws {
        await takeTurn()
        defer { endTurn() }
        try append(text)
        try await readUnread(keeping: 1)
    }

    /// Forgets the text.
    public func reset() async throws {
        await takeTurn()
        defer { endTurn() }
        isIntact = false
        try await model.reset()
        take(position: 0, unread: [], partialCharacter: [])
    }

    /// The text as it stands, in as many bytes however long it is. Write them to a file, and `restore` them later.
    public func save() async throws -> Data {
        await takeTurn()
        defer { endTurn() }
        guard isIntact else { throw TTTError.stateLost }
        let header = StateFile.Header(
            fingerprint: model.info.fingerprint, position: position, unread: unread,
            partialCharacter: partialCharacter)
        let state = try await model.saveState()
        return try StateFile(header: header, state: state).encoded()
    }

    /// Goes back to where the text stood when `saved` was saved.
    public func restore(_ saved: Data) async throws {
        await takeTurn()
        defer { endTurn() }
        let file = try StateFile(decoding: saved)
        guard file.header.fingerprint == model.info.fingerprint else { throw TTTError.stateOfAnotherModel }
        isIntact = false
        try await model.restoreState(file.state)
        take(
            position: file.header.position, unread: file.header.unread,
            partialCharacter: file.header.partialCharacter)
    }

    private func write(
        after prompt: String, options: TTTOptions, show: @Sendable (String) -> Void
    ) async throws {
        try options.check()
        await takeTurn()
        defer { endTurn() }
        try append(prompt)
        let endTokens = options.endTokens ?? model.info.endTokens
        var sampler = Sampler(options)
        var text = TextStream(stopStrings: options.stopStrings, partialCharacter: partialCharacter)
        defer { partialCharacter = text.partialCharacter }
        for _ in 0..<options.maxTokens {
            let logits = try await readUnread()
            let token: Int
            do {
                token = try sampler.next(logits)
            } catch {
                isIntact = false  // a state that gives such logits is not worth saving
                throw error
            }
            unread = [token]
            if endTokens.contains(token) { break }
            let piece = text.append(tokenizer.bytes(of: token))
            if !piece.isEmpty { show(piece) }
            if text.isStopped { return }
        }
        let rest = text.finish()
        if !rest.isEmpty { show(rest) }
    }

    /// Puts text behind what is there, for the model to read.
    private func append(_ text: String) throws {
        guard isIntact else { throw TTTError.stateLost }
        let isStart = position == 0 && unread.isEmpty
        let tokens = try isStart ? tokenizer.encode(text, addingSpecialTokens: true) : tokenizer.encodeMiddle(text)
        let size = model.info.vocabularySize
        if let stranger = tokens.first(where: { !(0..<size).contains($0) }) {
            throw TTTError.tokenOutsideVocabulary(stranger, size: size)
        }
        guard !(unread.isEmpty && tokens.isEmpty) else { throw TTTError.emptyPrompt }
        unread += tokens
        if !text.isEmpty { partialCharacter = [] }
    }

    /// Has the model read what is unread, up to the last `kept` tokens: single steps to the next mini-batch, then
    /// blocks.
    ///
    /// - Returns: logits of what follows the last token read; none if there was nothing to read.
    @discardableResult
    private func readUnread(keeping kept: Int = 0) async throws -> [Float] {
        let info = model.info
        var logits: [Float] = []
        var done = 0
        defer { unread.removeFirst(done) }
        while unread.count - done > kept {
            try Task.checkCancellation()
            let phase = position % info.miniBatchSize
            let count = phase == 0 ? min(unread.count - done - kept, info.prefillTokens) : 1
            isIntact = false
            if count == 1 {
                logits = try await model.decode(unread[done], position: phase)
            } else {
                let padding = [Int](repeating: 0, count: info.prefillTokens - count)
                let block = Array(unread[done..<(done + count)]) + padding
                logits = try await model.prefill(block, length: count)
            }
            isIntact = true
            position += count
            done += count
        }
        return logits
    }

    private func take(position: Int, unread: [Int], partialCharacter: [UInt8]) {
        self.position = position
        self.unread = unread
        self.partialCharacter = partialCharacter
        isIntact = true
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
