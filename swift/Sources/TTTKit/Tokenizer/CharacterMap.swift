import Foundation
import TTTFormats

/// SentencePiece's compiled map of characters: a double-array trie (Aoe 1989) over what it replaces, and the texts that it
/// puts there.
struct CharacterMap: Sendable {
    private let trie: [UInt32]
    private let texts: [UInt8]

    private static let longestGroup = 5  // bytes; longer groups of characters are looked up one by one

    init(base64: String) throws {
        guard let data = Data(base64Encoded: base64), data.count >= 4 else {
            throw TTTError.damaged("the tokenizer's character map")
        }
        let bytes = Array(data)
        func integer(at offset: Int) -> UInt32 {
            bytes[offset..<offset + 4].reversed().reduce(0) { $0 << 8 | UInt32($1) }
        }
        let size = Int(integer(at: 0))
        guard size % 4 == 0, size <= bytes.count - 4 else { throw TTTError.damaged("the tokenizer's character map") }
        trie = stride(from: 4, to: 4 + size, by: 4).map(integer)
        texts = Array(bytes[(4 + size)...])
    }

    func callAsFunction(_ text: [UInt8]) -> [UInt8] {
        var result: [UInt8] = []
        for character in String(decoding: text, as: UTF8.self) {
            let group = Array(character.utf8)
            if group.count <= Self.longestGroup, let replacement = replacement(of: group) {
                result += replacement
                continue
            }
            for scalar in character.unicodeScalars {
                let bytes = Array(String(scalar).utf8)
                result += replacement(of: bytes) ?? bytes
            }
        }
        return Array(String(decoding: result, as: UTF8.self).utf8)  // a damaged map may point into a character
    }

    /// Of the shortest start of `key` that the map has.
    private func replacement(of key: [UInt8]) -> [UInt8]? {
        guard var unit = trie.first else { return nil }
        var at = Self.offset(unit)
        for byte in key {
            guard byte != 0 else { return nil }
            at ^= Int(byte)
            guard trie.indices.contains(at) else { return nil }
            unit = trie[at]
            guard unit & 0x8000_00FF == UInt32(byte) else { return nil }
            at ^= Self.offset(unit)
            if unit >> 8 & 1 == 1 {
                guard trie.indices.contains(at) else { return nil }
                let start = Int(trie[at] & 0x7FFF_FFFF)
                guard start <= texts.count else { return nil }
                return Array(texts[start...].prefix { $0 != 0 })
            }
        }
        return nil
    }

    private static func offset(_ unit: UInt32) -> Int {
        Int(unit >> 10) << Int((unit & 1 << 9) >> 6)
    }
}
