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
    func prefill(_ block: [Int], length: Int) async throws -> [Float]

    /// Reads the next token of the text.
    ///
    /// - Parameter position: of the token in its mini-batch, from 0 to `info.miniBatchSize - 1`.
    /// - Returns: logits of what follows it, `info.vocabularySize` of them.
    func decode(_ token: Int, position: Int) async throws -> [Float]

    /// The state, as bytes that `restoreState` takes. Their number does not depend on the length of the text.
    func saveState() async throws -> Data

    /// Takes up a state that `saveState` gave.
    func restoreState(_ state: Data) async throws

    /// Back to the state before the first token.
    func reset() async throws
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
    /// Tells one set of weights from another.
    public let fingerprint: String

    public init(
        miniBatchSize: Int, vocabularySize: Int, prefillTokens: Int, endTokens: Set<Int>, fingerprint: String
    ) throws {
        guard miniBatchSize > 0, vocabularySize > 0, prefillTokens > 0, prefillTokens % miniBatchSize == 0 else {
            throw TTTError.notATTTPackage(
                "mini-batches of \(miniBatchSize), blocks of \(prefillTokens), \(vocabularySize) tokens")
        }
        self.miniBatchSize = miniBatchSize
        self.vocabularySize = vocabularySize
        self.prefillTokens = prefillTokens
        self.endTokens = endTokens
        self.fingerprint = fingerprint
    }

    /// - Parameter metadata: the entries that the exporter put into the package, by key.
    public init(metadata: [String: String]) throws {
        func entry<Value: Decodable>(_ name: String, as type: Value.Type) throws -> Value {
            let key = "com.mlx-ttt.\(name)"
            guard let text = metadata[key] else { throw TTTError.notATTTPackage("no \(key) in its metadata") }
            guard let value = try? JSONDecoder().decode(type, from: Data(text.utf8)) else {
                throw TTTError.notATTTPackage("\(key) is \"\(text)\"")
            }
            return value
        }
        let version = try entry("format", as: Int.self)
        guard version == 1 else { throw TTTError.formatVersion(version) }
        guard let fingerprint = metadata["com.mlx-ttt.model"] else {
            throw TTTError.notATTTPackage("no com.mlx-ttt.model in its metadata")
        }
        try self.init(
            miniBatchSize: entry("mini_batch_size", as: Int.self),
            vocabularySize: entry("vocab_size", as: Int.self),
            prefillTokens: entry("prefill_tokens", as: Int.self),
            endTokens: Set(entry("eos_token_id", as: [Int].self)),
            fingerprint: fingerprint)
    }
}

/// What goes wrong in a way that can be mended.
public enum TTTError: Error, Equatable, Sendable {
    case notATTTPackage(String)
    case formatVersion(Int)
    case unreadableFile(String, String)
    case unexpectedOutput(String)
    case emptyPrompt
    case tokenOutsideVocabulary(Int, size: Int)
    case invalidOption(String)
    case notANumber
    case stateLost
    case notAState
    case damagedState
    case stateOfAnotherModel
}

extension TTTError: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .notATTTPackage(let what):
            return "This is not a Core ML package of a TTT model (\(what)); export it with `convert.py coreml`."
        case .formatVersion(let version):
            return "The package has format version \(version), this code reads 1; "
                + "use the Swift files that lie beside the package."
        case .unreadableFile(let name, let reason):
            return "\(name) cannot be read (\(reason)); check that it is among the app's files."
        case .unexpectedOutput(let what):
            return "The model answered with \(what); export it again."
        case .emptyPrompt:
            return "There is no text to continue; give a prompt."
        case .tokenOutsideVocabulary(let token, let size):
            return "The tokenizer gave token \(token), the model knows \(size); use the tokenizer beside the package."
        case .invalidOption(let what):
            return "\(what)."
        case .notANumber:
            return "The logits are not finite; load the model with other compute units, such as .cpuOnly."
        case .stateLost:
            return "A call of the model failed midway, so its state is lost; restore a saved state or reset."
        case .notAState:
            return "This is not a saved state."
        case .damagedState:
            return "The saved state is damaged; read the text again."
        case .stateOfAnotherModel:
            return "The state was saved with another model; read the text again with this one."
        }
    }
}
