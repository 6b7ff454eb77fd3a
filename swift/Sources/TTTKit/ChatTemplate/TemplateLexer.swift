import TTTFormats

/// Cuts a template into texts, expressions and statements.
enum TemplateLexer {
    enum Piece: Equatable {
        case text(String)
        case expression([Token])
        case statement([Token])
    }

    enum Token: Equatable {
        case name(String)
        case text(String)
        case number(Int)
        case symbol(String)
    }

    /// Line breaks behind statements and white space in front of them on their line go, as in transformers.
    static func pieces(of source: String) throws -> [Piece] {
        var pieces: [Piece] = []
        var rest = Substring(source)
        var trimsStart = false  // of the text that comes
        var followsBlock = false
        while !rest.isEmpty {
            let open = firstTag(in: rest)
            var text = String(rest[..<(open ?? rest.endIndex)])
            if trimsStart { text = String(text.drop { $0.isWhitespace }) }
            if followsBlock, !trimsStart, text.first?.isNewline == true { text.removeFirst() }
            guard let open else {
                if !text.isEmpty { pieces.append(.text(text)) }
                break
            }
            let kind = rest[rest.index(after: open)]
            let close = kind == "{" ? "}}" : kind == "%" ? "%}" : "#}"
            let inside = rest[rest.index(open, offsetBy: 2)...]
            guard let end = self.end(close, in: inside) else { throw TTTError.unsupported("The chat template has a tag without end") }
            var body = inside[..<end]
            let trimsEnd = body.first == "-"
            if trimsEnd { body.removeFirst() }
            trimsStart = body.last == "-"
            if trimsStart { body.removeLast() }
            if trimsEnd {
                while text.last?.isWhitespace == true { text.removeLast() }
            } else if kind != "{" {
                let line = text.reversed().prefix { $0 == " " || $0 == "\t" }
                if line.count == text.count || text.dropLast(line.count).last?.isNewline == true { text.removeLast(line.count) }
            }
            if !text.isEmpty { pieces.append(.text(text)) }
            if kind == "{" { pieces.append(.expression(try tokens(of: body))) }
            if kind == "%" { pieces.append(.statement(try tokens(of: body))) }
            followsBlock = kind != "{"
            rest = inside[inside.index(end, offsetBy: 2)...]
        }
        return pieces
    }

    private static func firstTag(in text: Substring) -> Substring.Index? {
        text.indices.first { at in
            text[at] == "{" && text.index(after: at) < text.endIndex && "{%#".contains(text[text.index(after: at)])
        }
    }

    /// Where the tag closes, texts in quotes aside.
    private static func end(_ close: String, in text: Substring) -> Substring.Index? {
        var quote: Character?
        var at = text.startIndex
        while at < text.endIndex {
            let character = text[at]
            if let open = quote {
                if character == "\\", text.index(after: at) < text.endIndex { at = text.index(after: at) }
                if character == open { quote = nil }
            } else if text[at...].hasPrefix(close) {
                return at
            } else if close != "#}", character == "'" || character == "\"" {
                quote = character
            }
            at = text.index(after: at)
        }
        return nil
    }

    private static let symbols = ["==", "!=", "<=", ">=", "+", "-", "~", "%", "*", "(", ")", "[", "]", "{", "}", ".", ",", ":", "|", "=", "<", ">"]

    private static func tokens(of body: Substring) throws -> [Token] {
        var tokens: [Token] = []
        var rest = body
        while let character = rest.first {
            if character.isWhitespace {
                rest.removeFirst()
            } else if character == "'" || character == "\"" {
                rest.removeFirst()
                tokens.append(.text(try quoted(&rest, by: character)))
            } else if character.isNumber {
                let digits = rest.prefix { $0.isNumber }
                guard let number = Int(digits) else { throw TTTError.unsupported("The chat template has a number \(digits)") }
                tokens.append(.number(number))
                rest = rest.dropFirst(digits.count)
            } else if character.isLetter || character == "_" {
                let name = rest.prefix { $0.isLetter || $0.isNumber || $0 == "_" }
                tokens.append(.name(String(name)))
                rest = rest.dropFirst(name.count)
            } else if let symbol = symbols.first(where: { rest.hasPrefix($0) }) {
                tokens.append(.symbol(symbol))
                rest = rest.dropFirst(symbol.count)
            } else {
                throw TTTError.unsupported("The chat template has \(character), which is not known here")
            }
        }
        return tokens
    }

    private static func quoted(_ rest: inout Substring, by quote: Character) throws -> String {
        var text = ""
        while let character = rest.popFirst() {
            if character == quote { return text }
            guard character == "\\", let escaped = rest.popFirst() else {
                text.append(character)
                continue
            }
            switch escaped {
            case "n": text.append("\n")
            case "t": text.append("\t")
            case "r": text.append("\r")
            default: text.append(escaped)
            }
        }
        throw TTTError.unsupported("The chat template has a text without end")
    }
}
