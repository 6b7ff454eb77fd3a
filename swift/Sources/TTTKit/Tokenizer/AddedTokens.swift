import TTTFormats

/// Tokens that are found in a text as a whole, before anything else is done to it.
struct AddedTokens: Sendable {
    private struct Token: Sendable {
        let content: [UInt8]
        let id: Int
        let stripsLeft: Bool
        let stripsRight: Bool
    }

    enum Part {
        case text([UInt8])
        case token(Int)
    }

    /// By their first byte, the longest first.
    private let tokens: [UInt8: [Token]]

    /// - Parameters:
    ///   - list: `added_tokens` of a tokenizer.json, as many as are wanted.
    ///   - normalizer: for those that are looked for in normalized text.
    init(_ list: [JSON], normalizer: Normalizer? = nil) throws {
        var tokens: [UInt8: [Token]] = [:]
        for entry in list {
            guard let text = entry["content"]?.string, let id = entry["id"]?.int else {
                throw TTTError.damaged("added_tokens of tokenizer.json")
            }
            guard entry["single_word"]?.bool != true else {
                throw TTTError.unsupported("tokenizer.json has a token \(text) that must be a word, which is not known here")
            }
            let content = normalizer?(Array(text.utf8)) ?? Array(text.utf8)
            guard let first = content.first else { continue }
            tokens[first, default: []].append(
                Token(
                    content: content, id: id, stripsLeft: entry["lstrip"]?.bool ?? false,
                    stripsRight: entry["rstrip"]?.bool ?? false))
        }
        self.tokens = tokens.mapValues { $0.sorted { $0.content.count > $1.content.count } }
    }

    func split(_ text: [UInt8]) -> [Part] {
        guard !tokens.isEmpty else { return text.isEmpty ? [] : [.text(text)] }
        var parts: [Part] = []
        var (start, at) = (0, 0)
        while at < text.count {
            let found = tokens[text[at]]?.first { text[at...].starts(with: $0.content) }
            guard let found else {
                at += 1
                continue
            }
            var (left, right) = (at, at + found.content.count)
            while found.stripsLeft, left > start, Self.isSpace(text[left - 1]) { left -= 1 }
            while found.stripsRight, right < text.count, Self.isSpace(text[right]) { right += 1 }
            if left > start { parts.append(.text(Array(text[start..<left]))) }
            parts.append(.token(found.id))
            (start, at) = (right, right)
        }
        if start < text.count { parts.append(.text(Array(text[start...]))) }
        return parts
    }

    private static func isSpace(_ byte: UInt8) -> Bool {
        [0x20, 0x09, 0x0A, 0x0B, 0x0C, 0x0D].contains(byte)
    }
}
