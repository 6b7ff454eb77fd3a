import Foundation
import TTTFormats

@testable import TTTKit

/// A model whose state is the text itself, and that says of every call whether it may be made.
actor FakeModel: TTTModel {
    enum Call: Equatable {
        case prefill(length: Int)
        case decode(position: Int)
    }

    struct Failure: Error {}

    nonisolated let info: TTTModelInfo
    private let next: @Sendable ([Int]) -> Int
    private(set) var text: [Int] = []
    private(set) var calls: [Call] = []
    private var failsAtCall: Int?

    /// - Parameter next: the likeliest token after a text.
    init(_ info: TTTModelInfo, next: @escaping @Sendable ([Int]) -> Int) {
        self.info = info
        self.next = next
    }

    func fail(atCall call: Int) {
        failsAtCall = call
    }

    func prefill(_ block: [Int], length: Int) throws -> [Float] {
        guard text.count % info.miniBatchSize == 0, block.count == info.prefillTokens,
            (1...block.count).contains(length)
        else { throw Failure() }
        return try read(block.prefix(length), call: .prefill(length: length))
    }

    func decode(_ token: Int, position: Int) throws -> [Float] {
        guard text.count % info.miniBatchSize == position else { throw Failure() }
        return try read([token], call: .decode(position: position))
    }

    func state(position: Int) -> [LayerState] {
        let rows = Tensor(shape: [text.count], values: text.map { Float($0) })
        return [LayerState(offset: position, weights: [], rows: rows, history: [:])]
    }

    func restore(_ state: [LayerState]) throws {
        guard state.count == 1 else { throw TTTError.stateOfAnotherModel }
        text = state[0].rows.values.map { Int($0) }
    }

    func reset() {
        text = []
    }

    private func read<Tokens: Sequence>(_ tokens: Tokens, call: Call) throws -> [Float] where Tokens.Element == Int {
        calls.append(call)
        if calls.count == failsAtCall { throw Failure() }
        text += tokens
        var logits = [Float](repeating: 0, count: info.vocabularySize)
        logits[next(text)] = 1
        return logits
    }
}

/// A token is a byte; 256 begins a text, 257 ends it.
struct ByteTokenizer: TTTTokenizer {
    static let begin = 256
    static let end = 257

    func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
        (addingSpecialTokens ? [Self.begin] : []) + text.utf8.map { Int($0) }
    }

    func bytes(of token: Int) -> [UInt8] {
        token < 256 ? [UInt8(token)] : []
    }

    var leadingSpaces: LeadingSpaces { .kept }
}

extension TTTModelInfo {
    static func test(
        miniBatchSize: Int = 4, prefillTokens: Int = 8, vocabularySize: Int = 258, fingerprint: String = "a"
    ) throws -> TTTModelInfo {
        try TTTModelInfo(
            miniBatchSize: miniBatchSize, vocabularySize: vocabularySize, prefillTokens: prefillTokens,
            endTokens: [ByteTokenizer.end], fingerprint: fingerprint)
    }
}

/// A model that writes `script` after a text of `start` tokens, and then the end token.
func scripted(_ script: String, after start: Int, info: TTTModelInfo) -> FakeModel {
    let tokens = script.utf8.map { Int($0) }
    return FakeModel(info) { text in
        let written = text.count - start
        return tokens.indices.contains(written) ? tokens[written] : ByteTokenizer.end
    }
}

/// A model that writes letters that depend on the whole text.
func mixing(_ info: TTTModelInfo) -> FakeModel {
    FakeModel(info) { text in
        var mixed = 0
        for (index, token) in text.enumerated() {
            mixed = (mixed * 31 + token * (index + 1)) % 1_000_003
        }
        return 97 + mixed % 26
    }
}

extension TTTGenerator {
    func pieces(_ prompt: String = "", _ options: TTTOptions = TTTOptions()) async throws -> [String] {
        var pieces: [String] = []
        for try await piece in generate(prompt, options: options) { pieces.append(piece) }
        return pieces
    }

    func text(_ prompt: String = "", maxTokens: Int) async throws -> String {
        try await pieces(prompt, TTTOptions(maxTokens: maxTokens)).joined()
    }
}
