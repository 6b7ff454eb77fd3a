import TTTFormats
import TTTKit

/// A model whose state is the text itself, and that writes letters that depend on the whole text.
actor FakeModel: TTTModel {
    struct Failure: Error {}

    nonisolated let info: TTTModelInfo
    private var text: [Int] = []
    private var calls = 0
    private(set) var gaveBack = 0
    private let failsAtCall: Int?
    /// Waited for in every call.
    private let pace: @Sendable () async -> Void

    /// - Parameter endsAt: how many tokens a text has when the end token comes.
    init(failsAtCall: Int? = nil, endsAt: Int? = nil, pace: @escaping @Sendable () async -> Void = {}) throws {
        info = try TTTModelInfo(
            miniBatchSize: 4, vocabularySize: 258, prefillTokens: 8, endTokens: [257], fingerprint: "a")
        (self.failsAtCall, self.endsAt, self.pace) = (failsAtCall, endsAt, pace)
    }

    private let endsAt: Int?

    func prefill(_ block: [Int], length: Int) async throws -> [Float] {
        try await read(block.prefix(length))
    }

    func decode(_ token: Int, position: Int) async throws -> [Float] {
        try await read([token])
    }

    private func read<Tokens: Sequence>(_ tokens: Tokens) async throws -> [Float] where Tokens.Element == Int {
        await pace()
        calls += 1
        if calls == failsAtCall { throw Failure() }
        text += tokens
        var mixed = 0
        for (index, token) in text.enumerated() { mixed = (mixed * 31 + token * (index + 1)) % 1_000_003 }
        var logits = [Float](repeating: 0, count: info.vocabularySize)
        logits[text.count == endsAt ? 257 : 97 + mixed % 26] = 1
        return logits
    }

    func state(position: Int) -> [LayerState] {
        let rows = Tensor(shape: [text.count], values: text.map { Float($0) })
        return [LayerState(offset: position, weights: [], rows: rows, history: [:])]
    }

    func restore(_ state: [LayerState]) throws {
        guard state.count == 1 else { throw TTTError.stateOfAnotherModel }
        text = state[0].rows.values.map { Int($0) }
    }

    func reset() { text = [] }

    func giveBackMemory() { gaveBack += 1 }
}

/// A token is a byte; 256 begins a text.
struct ByteTokenizer: TTTTokenizer {
    func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
        (addingSpecialTokens ? [256] : []) + text.utf8.map { Int($0) }
    }

    func bytes(of token: Int) -> [UInt8] { token < 256 ? [UInt8(token)] : [] }

    var leadingSpaces: LeadingSpaces { .kept }
}
