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

    /// Multiplies the inner learning rates of the tokens to come, until the next call of this. 0 freezes what was
    /// learned, 1 is the model as it is. No part of the state: `restore` and `reset` leave it.
    ///
    /// - Parameter scale: of `info.learningShape`; finite numbers that are not negative.
    /// - Throws: `TTTError.noLearningScale`, `.invalidOption`; then the scale stays as it was.
    func setLearning(_ scale: Tensor) async throws

    /// What the layers did with each token that the last call read, in order.
    ///
    /// - Throws: `TTTError.noSignals`.
    func signals() async throws -> [TTTSignals]

    /// Gives back what can be loaded again when it is needed. The state stays.
    func giveBackMemory() async
}

// None of these is `async`: in an asynchronous context Swift would take it instead of a model's own that is not.
extension TTTModel {
    /// Throws `TTTError.noLearningScale`: not every model takes a scale.
    public func setLearning(_ scale: Tensor) throws {
        throw TTTError.noLearningScale
    }

    /// Throws `TTTError.noSignals`: not every model gives signals.
    public func signals() throws -> [TTTSignals] {
        throw TTTError.noSignals
    }

    /// Does nothing: not every model has something to give back.
    public func giveBackMemory() {}
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
    /// [layers, heads], the shape of the learning scale; nil if the model takes none.
    public var learningShape: [Int]?
    /// Whether the model shows what its layers do with each token.
    public var givesSignals = false

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
        if metadata["com.mlx-ttt.learning"] != nil {
            let shape = try json("learning").array?.map(\.int) ?? []
            let sizes = shape.compactMap { $0 }
            guard shape.count == 2, sizes.count == 2, sizes.allSatisfy({ (1...10_000).contains($0) }) else {
                throw TTTError.notATTTPackage("com.mlx-ttt.learning is \"\(try text("learning"))\"")
            }
            learningShape = sizes
        }
        if metadata["com.mlx-ttt.signals"] != nil {
            let names = Set(try json("signals").array?.compactMap(\.string) ?? [])
            guard names.isSuperset(of: ["loss", "lr", "writeNorm"]) else {
                throw TTTError.notATTTPackage("com.mlx-ttt.signals is \"\(try text("signals"))\"")
            }
            givesSignals = true
        }
    }

    /// - Throws: `TTTError.noLearningScale`, or `.invalidOption` if the model does not take this scale.
    package func check(learning scale: Tensor) throws {
        guard let learningShape else { throw TTTError.noLearningScale }
        guard scale.shape == learningShape else {
            throw TTTError.invalidOption("The learning scale is \(scale.shape), the model takes \(learningShape)")
        }
        if let wrong = scale.values.first(where: { !($0.isFinite && $0 >= 0) }) {
            throw TTTError.invalidOption("The learning scale has \(wrong), expected finite numbers from 0 on")
        }
    }
}
