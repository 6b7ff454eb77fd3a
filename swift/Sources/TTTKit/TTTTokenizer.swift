/// Text to token ids, and token ids to the bytes that they stand for.
public protocol TTTTokenizer: Sendable {
    /// - Parameter addingSpecialTokens: whether to put in what the tokenizer adds to a whole text, such as BOS.
    func encode(_ text: String, addingSpecialTokens: Bool) throws -> [Int]

    /// What a token adds to a text: UTF-8, possibly a part of a character. Nothing for control tokens.
    func bytes(of token: Int) -> [UInt8]

    /// How a token's bytes go with those before. `.bytes` if a tokenizer does not say.
    func kind(of token: Int) -> TTTTokenKind

    /// What becomes of spaces at the start of a text when it is put together from tokens.
    var leadingSpaces: LeadingSpaces { get }
}

/// How the bytes of a token go with those of the tokens before.
public enum TTTTokenKind: Sendable {
    /// They may be a part of a character.
    case bytes
    /// They are whole characters, or none. Bytes before that have not become a character never will.
    case text
    /// The same, and they begin with a space, which at the start of a text the tokenizer may have put there.
    case word
}

/// Spaces at the start of a text that is put together from tokens.
public enum LeadingSpaces: Sendable {
    /// All are the text's own.
    case kept
    /// The first was put there by the tokenizer, and is taken away.
    case first
    /// None is kept.
    case none
}

extension TTTTokenizer {
    /// `.bytes`
    public func kind(of token: Int) -> TTTTokenKind { .bytes }

    /// Text that goes on after other text.
    ///
    /// Some tokenizers put a space in front of every text. After a line break they do not, so the text is encoded
    /// behind one, and that is taken off again.
    func encodeMiddle(_ text: String) throws -> [Int] {
        guard !text.isEmpty else { return [] }
        let before = try encode("\n", addingSpecialTokens: false)
        let both = try encode("\n" + text, addingSpecialTokens: false)
        guard both.starts(with: before) else { return try encode(text, addingSpecialTokens: false) }
        return Array(both.dropFirst(before.count))
    }

    /// The text of these tokens. Bytes that belong to no character become U+FFFD.
    public func decode(_ tokens: [Int]) -> String {
        var detokenizer = Detokenizer(self)
        return String(decoding: tokens.flatMap { detokenizer.append($0) }, as: UTF8.self)
    }
}
