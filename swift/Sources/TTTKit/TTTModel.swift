import Foundation

/// A TTT language model in the middle of a text. It keeps the state; its caller keeps the position in the text.
///
/// The calls for one text come one after the other.
public protocol TTTModel: Sendable {
    /// What the package says of itself.
    var info: TTTModelInfo { get }

    /// Reads the next tokens of the text. Only at the start of a mini-batch.
    ///
    /// - Parameters:
    ///   - block: token ids, `info.prefillTokens` of them.
    ///   - length: how many of them count, at least 1; the others are padding.
    /// - Returns: logits of what follows the last token that counts, `info.vocabularySize` of them.
    /// - Throws: what the framework throws; then the state is lost until `restore` or `reset`.
    func prefill(_ block: [Int], length: Int) async throws -> [Float]

    /// Reads the next token of the text.
    ///
    /// - Parameter position: of the token in its mini-batch, from 0 to `info.miniBatchSize - 1`.
    /// - Returns: logits of what follows it, `info.vocabularySize` of them.
    /// - Throws: as `prefill`.
    func decode(_ token: Int, position: Int) async throws -> [Float]

    /// The state, one per layer. Its size does not depend on the length of the text.
    ///
    /// - Parameter position: tokens of the text that the model has read.
    func state(position: Int) async throws -> [LayerState]

    /// Takes up a state.
    ///
    /// - Throws: `TTTError.stateOfAnotherModel` if its arrays have other shapes than the model's; then the model stays
    ///   as it was.
    func restore(_ state: [LayerState]) async throws

    /// Back to the state before the first token.
    func reset() async throws

    /// Gives back what can be loaded again when it is needed. The state stays.
    func giveBackMemory() async
}

extension TTTModel {
    /// Does nothing: not every model has something to give back.
    public func giveBackMemory() async {}
}

/// What a package says of itself: no number of a certain model is written down in this code.
public struct TTTModelInfo: Sendable, Equatable {
    /// Tokens in a mini-batch, K.
    public let miniBatchSize: Int
    /// Logits that a call gives.
    public let vocabularySize: Int
    /// Tokens that a call of `prefill` takes: K or a multiple of it.
    public let prefillTokens: Int
    /// Tokens at which a text ends.
    public let endTokens: Set<Int>
    /// Of the configuration, weights and tokenizer of the model directory: states go with it.
    public let fingerprint: String
    /// How the large matrices are stored, such as "float16" or "int8".
    public let weights: String

    /// Of tokens, known or in a block; no model is near it. They are 32-bit integers on their way.
    private static let most = 10_000_000

    /// - Parameters:
    ///   - miniBatchSize: tokens, K.
    ///   - vocabularySize: logits, V.
    ///   - prefillTokens: a multiple of K.
    ///   - endTokens: ids.
    ///   - fingerprint: what states of this model say.
    ///   - weights: how they are stored.
    /// - Throws: `TTTError.notATTTPackage` if the numbers do not go together.
    public init(
        miniBatchSize: Int, vocabularySize: Int, prefillTokens: Int, endTokens: Set<Int>, fingerprint: String,
        weights: String = "float32"
    ) throws {
        guard miniBatchSize > 0, (1...Self.most).contains(vocabularySize), (1...Self.most).contains(prefillTokens),
            prefillTokens % miniBatchSize == 0
        else {
            throw TTTError.notATTTPackage(
                "mini-batches of \(miniBatchSize), blocks of \(prefillTokens), \(vocabularySize) tokens")
        }
        self.miniBatchSize = miniBatchSize
        self.vocabularySize = vocabularySize
        self.prefillTokens = prefillTokens
        self.endTokens = endTokens
        self.fingerprint = fingerprint
        self.weights = weights
    }

    /// - Parameters:
    ///   - metadata: the entries that the exporter put into the package, by key.
    ///   - source: what the package was exported from.
    /// - Throws: `TTTError.notATTTPackage`, `.formatVersion`.
    public init(metadata: [String: String], source: ModelSource) throws {
        func text(_ name: String) throws -> String {
            let key = "com.mlx-ttt.\(name)"
            guard let text = metadata[key] else { throw TTTError.notATTTPackage("no \(key) in its metadata") }
            return text
        }
        func json(_ name: String) throws -> JSON {
            guard let value = try? JSON(text(name).utf8) else {
                throw TTTError.notATTTPackage("com.mlx-ttt.\(name) is \"\(try text(name))\"")
            }
            return value
        }
        func integer(_ name: String) throws -> Int {
            guard let value = try json(name).int else {
                throw TTTError.notATTTPackage("com.mlx-ttt.\(name) is \"\(try text(name))\"")
            }
            return value
        }
        let version = try integer("format")
        guard version == 1 else { throw TTTError.formatVersion(version) }
        guard try text("model") == source.modelFingerprint else {
            throw TTTError.notATTTPackage("com.mlx-ttt.model is not the model of source.safetensors")
        }
        guard let endTokens = try json("eos_token_id").array?.map(\.int), !endTokens.contains(nil) else {
            throw TTTError.notATTTPackage("com.mlx-ttt.eos_token_id is \"\(try text("eos_token_id"))\"")
        }
        try self.init(
            miniBatchSize: integer("mini_batch_size"), vocabularySize: integer("vocab_size"),
            prefillTokens: integer("prefill_tokens"), endTokens: Set(endTokens.compactMap { $0 }),
            fingerprint: source.fingerprint, weights: text("weights"))
    }
}
