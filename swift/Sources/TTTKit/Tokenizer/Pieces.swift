import TTTFormats

/// What a token adds to a text: UTF-8, or bytes that are no text by themselves. Nothing for control tokens.
struct Piece: Sendable {
    let bytes: [UInt8]
    let kind: TTTTokenKind
}

/// What each token adds to a text.
enum Pieces {
    private static let space = "\u{2581}"  // SentencePiece writes a space as this character
    private static let unknown = " \u{2047} "  // SentencePiece shows the unknown piece as this text

    /// By id.
    static func all(
        _ vocabulary: [(token: String, id: Int)], added: [JSON], decoder: JSON?, settings: JSON
    ) -> [Piece] {
        let special = Set(added.filter { $0["special"]?.bool == true }.compactMap { $0["id"]?.int })
        let isByteLevel = Decoder.isByteLevel(decoder)
        let unknownToken = settings["unk_token"]?.string ?? settings["unk_token"]?["content"]?.string ?? "<unk>"
        let nothing = Piece(bytes: [], kind: isByteLevel ? .bytes : .text)
        var pieces = [Piece](repeating: nothing, count: (vocabulary.map(\.id).max() ?? -1) + 1)
        for (token, id) in vocabulary {
            if isByteLevel {
                if special.contains(id) { continue }
                pieces[id] = Piece(bytes: ByteAlphabet.bytes(token) ?? Array(token.utf8), kind: .bytes)
            } else if token.utf8.elementsEqual(unknownToken.utf8) {
                pieces[id] = Piece(bytes: Array(unknown.utf8), kind: .text)
            } else if let byte = byte(token) {
                if !special.contains(id) { pieces[id] = Piece(bytes: byte, kind: .bytes) }
            } else if !special.contains(id) {
                let isWord = token.utf8.starts(with: space.utf8)
                pieces[id] = Piece(bytes: token.utf8.split(space), kind: isWord ? .word : .text)
            }
        }
        return pieces
    }

    private static func byte(_ token: String) -> [UInt8]? {
        let characters = Array(token.utf8)
        guard characters.count == 6, token.hasPrefix("<0x"), token.hasSuffix(">") else { return nil }
        let digits = String(decoding: characters[3..<5], as: UTF8.self)
        guard digits == digits.uppercased(), let byte = UInt8(digits, radix: 16) else { return nil }
        return [byte]
    }
}

extension String.UTF8View {
    /// With a space for each `mark`.
    fileprivate func split(_ mark: String) -> [UInt8] {
        let (text, mark) = (Array(self), Array(mark.utf8))
        var (result, at) = ([UInt8](), 0)
        while at < text.count {
            if text[at...].starts(with: mark) {
                result.append(UInt8(ascii: " "))
                at += mark.count
            } else {
                result.append(text[at])
                at += 1
            }
        }
        return result
    }
}

/// What a tokenizer.json says of decoding, as far as it matters here.
enum Decoder {
    private static func steps(_ json: JSON?) -> [JSON] {
        guard let json, !json.isNull else { return [] }
        return [json] + (json["decoders"]?.array ?? []).flatMap(steps)
    }

    static func isByteLevel(_ json: JSON?) -> Bool {
        steps(json).contains { $0["type"]?.string == "ByteLevel" }
    }

    /// Whether a text's first space is taken away, because the tokenizer has put it there.
    static func strips(_ json: JSON?) -> Bool {
        steps(json).contains { step in
            switch step["type"]?.string {
            case "Strip": step["content"]?.string == " " && (step["start"]?.int ?? 0) > 0
            case "Metaspace": step["prepend_scheme"]?.string != "never" && step["add_prefix_space"]?.bool != false
            default: false
            }
        }
    }
}
