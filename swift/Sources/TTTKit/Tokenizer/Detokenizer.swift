import TTTFormats

/// Tokens in, text out: whole characters, each as soon as its bytes are there.
///
/// A byte that belongs to no character becomes one U+FFFD, as in Python's detokenizer.
struct Detokenizer {
    private let tokenizer: any TTTTokenizer
    private var held: [UInt8] = []
    private var isAtStart: Bool

    private static let replacement = Array("\u{FFFD}".utf8)

    /// - Parameter context: the tokens before, of which the last may hold the first bytes of a character.
    init(_ tokenizer: any TTTTokenizer, context: [Int] = []) {
        self.tokenizer = tokenizer
        isAtStart = tokenizer.leadingSpaces != .kept
        for token in context { _ = append(token) }
    }

    /// The text that this token completes, as UTF-8.
    mutating func append(_ token: Int) -> [UInt8] {
        var bytes = tokenizer.bytes(of: token)
        let kind = tokenizer.kind(of: token)
        var text: [UInt8] = []
        if kind != .bytes {
            for _ in held { text += Self.replacement }
            held = []
            if isAtStart, text.isEmpty, kind == .word, bytes.first == UInt8(ascii: " ") {
                bytes.removeFirst()
                isAtStart = tokenizer.leadingSpaces == .none
            }
        }
        held += bytes
        while !held.isEmpty {
            let length = Self.length(ofCharacter: held[...])
            if length == 0 { break }  // more bytes must come
            text += length > 0 ? Array(held.prefix(length)) : Self.replacement
            held.removeFirst(max(length, 1))
        }
        if !text.isEmpty { isAtStart = false }
        return text
    }

    /// When no more tokens come. An incomplete character is dropped, or was never one.
    mutating func finish() {
        held = []
    }

    /// Of the character that the bytes begin with; 0 if it is not complete, -1 if it is none.
    private static func length(ofCharacter bytes: ArraySlice<UInt8>) -> Int {
        guard let first = bytes.first else { return 0 }
        let count: Int
        var second: ClosedRange<UInt8> = 0x80...0xBF
        switch first {
        case 0...0x7F: return 1
        case 0xC2...0xDF: count = 2
        case 0xE0: (count, second) = (3, 0xA0...0xBF)
        case 0xED: (count, second) = (3, 0x80...0x9F)
        case 0xE1...0xEF: count = 3
        case 0xF0: (count, second) = (4, 0x90...0xBF)
        case 0xF4: (count, second) = (4, 0x80...0x8F)
        case 0xF1...0xF3: count = 4
        default: return -1
        }
        for (index, byte) in bytes.dropFirst().prefix(count - 1).enumerated() {
            if !(index == 0 ? second : 0x80...0xBF).contains(byte) { return -1 }
        }
        return bytes.count < count ? 0 : count
    }
}
