/// A JSON value.
///
/// Keys are compared byte by byte, because `String` takes "é" and "e\u{301}" for one, and vocabularies do not.
package enum JSON: Sendable {
    case null
    case bool(Bool)
    /// `isInteger`: written without a point or an exponent.
    case number(Double, isInteger: Bool)
    case string(String)
    case array([JSON])
    case object([Member])

    package struct Member: Sendable {
        package let key: String
        package let value: JSON
    }

    /// - Throws: `TTTError.damaged` if the bytes are no JSON, or a key occurs twice.
    package init<Bytes: Sequence>(_ bytes: Bytes) throws where Bytes.Element == UInt8 {
        var parser = JSONParser(bytes: Array(bytes))
        self = try parser.document()
    }

    package subscript(key: String) -> JSON? {
        guard case .object(let members) = self else { return nil }
        return members.first { $0.key.utf8.elementsEqual(key.utf8) }?.value
    }

    package var string: String? {
        if case .string(let text) = self { text } else { nil }
    }

    package var bool: Bool? {
        if case .bool(let flag) = self { flag } else { nil }
    }

    package var number: Double? {
        if case .number(let value, _) = self { value } else { nil }
    }

    package var isInteger: Bool {
        if case .number(_, let isInteger) = self { isInteger } else { false }
    }

    package var int: Int? {
        number.flatMap { Int(exactly: $0) }
    }

    package var array: [JSON]? {
        if case .array(let values) = self { values } else { nil }
    }

    package var members: [Member]? {
        if case .object(let members) = self { members } else { nil }
    }

    package var isNull: Bool {
        if case .null = self { true } else { false }
    }
}

private struct JSONParser {
    private let bytes: [UInt8]
    private var at = 0
    private var depth = 0

    private static let deepest = 100

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    mutating func document() throws -> JSON {
        let value = try value()
        skipSpace()
        guard at == bytes.count else { throw damage("something follows the value") }
        return value
    }

    private func damage(_ what: String) -> TTTError {
        .damaged("JSON at byte \(at): \(what)")
    }

    private mutating func skipSpace() {
        while at < bytes.count, [0x20, 0x0A, 0x0D, 0x09].contains(bytes[at]) { at += 1 }
    }

    /// The next byte that is no space.
    private mutating func peek() throws -> UInt8 {
        skipSpace()
        guard at < bytes.count else { throw damage("it ends too early") }
        return bytes[at]
    }

    private mutating func expect(_ character: Unicode.Scalar) throws {
        guard try peek() == UInt8(ascii: character) else { throw damage("expected \(character)") }
        at += 1
    }

    private mutating func value() throws -> JSON {
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.deepest else { throw damage("too many levels") }
        switch try peek() {
        case UInt8(ascii: "{"): return .object(try members())
        case UInt8(ascii: "["): return .array(try elements())
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        default: return try number()
        }
    }

    private mutating func word(_ word: String, _ value: JSON) throws -> JSON {
        guard bytes[at...].starts(with: word.utf8) else { throw damage("expected \(word)") }
        at += word.utf8.count
        return value
    }

    private mutating func number() throws -> JSON {
        let start = at
        while at < bytes.count, "+-0123456789.eE".utf8.contains(bytes[at]) { at += 1 }
        guard let value = Double(String(decoding: bytes[start..<at], as: UTF8.self)) else {
            throw damage("no value")
        }
        return .number(value, isInteger: !bytes[start..<at].contains { ".eE".utf8.contains($0) })
    }

    private mutating func elements() throws -> [JSON] {
        try expect("[")
        var values: [JSON] = []
        if try peek() == UInt8(ascii: "]") {
            at += 1
            return values
        }
        while true {
            values.append(try value())
            if try peek() == UInt8(ascii: "]") {
                at += 1
                return values
            }
            try expect(",")
        }
    }

    private mutating func members() throws -> [JSON.Member] {
        try expect("{")
        var members: [JSON.Member] = []
        var seen: Set<[UInt8]> = []
        if try peek() == UInt8(ascii: "}") {
            at += 1
            return members
        }
        while true {
            _ = try peek()
            let key = try string()
            guard seen.insert(Array(key.utf8)).inserted else { throw damage("a key occurs twice") }
            try expect(":")
            members.append(JSON.Member(key: key, value: try value()))
            if try peek() == UInt8(ascii: "}") {
                at += 1
                return members
            }
            try expect(",")
        }
    }

    private mutating func string() throws -> String {
        try expect("\"")
        var text: [UInt8] = []
        while true {
            guard at < bytes.count else { throw damage("a text does not end") }
            let byte = bytes[at]
            at += 1
            switch byte {
            case UInt8(ascii: "\""): return String(decoding: text, as: UTF8.self)
            case UInt8(ascii: "\\"): text += Array(String(Character(try escaped())).utf8)
            case 0..<0x20: throw damage("a control character in a text")
            default: text.append(byte)
            }
        }
    }

    private mutating func escaped() throws -> Unicode.Scalar {
        guard at < bytes.count else { throw damage("a text does not end") }
        let byte = bytes[at]
        at += 1
        switch byte {
        case UInt8(ascii: "n"): return "\n"
        case UInt8(ascii: "t"): return "\t"
        case UInt8(ascii: "r"): return "\r"
        case UInt8(ascii: "b"): return "\u{8}"
        case UInt8(ascii: "f"): return "\u{C}"
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return Unicode.Scalar(byte)
        case UInt8(ascii: "u"): return try escapedUnit()
        default: throw damage("an unknown escape")
        }
    }

    /// A code unit of UTF-16 in hexadecimal, or two that make a scalar. Half of a pair is U+FFFD.
    private mutating func escapedUnit() throws -> Unicode.Scalar {
        let unit = try hexadecimal()
        if let scalar = Unicode.Scalar(unit) { return scalar }
        guard (0xD800..<0xDC00).contains(unit), bytes[at...].starts(with: "\\u".utf8) else { return "\u{FFFD}" }
        let back = at
        at += 2
        let second = try hexadecimal()
        guard (0xDC00..<0xE000).contains(second) else {
            at = back
            return "\u{FFFD}"
        }
        return Unicode.Scalar(0x10000 + (unit - 0xD800) << 10 + (second - 0xDC00)) ?? "\u{FFFD}"
    }

    private mutating func hexadecimal() throws -> UInt32 {
        let digits = bytes[at...].prefix(4)
        guard digits.count == 4, digits.allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }),
            let unit = UInt32(String(decoding: digits, as: UTF8.self), radix: 16)
        else { throw damage("expected four hexadecimal digits") }
        at += 4
        return unit
    }
}
