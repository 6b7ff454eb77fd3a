import Foundation

/// Text to token ids, and token ids to the bytes that they stand for.
public protocol TTTTokenizer: Sendable {
    /// - Parameter addingSpecialTokens: whether to put in what the tokenizer adds to a whole text, such as BOS.
    func encode(_ text: String, addingSpecialTokens: Bool) throws -> [Int]

    /// What a token adds to a text: UTF-8, possibly a part of a character. Nothing for control tokens.
    func bytes(of token: Int) -> [UInt8]
}

extension TTTTokenizer {
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
}

/// The bytes that each token stands for, from `pieces.json`: a list in which a token's entry is a text, or a list
/// of bytes where it is no text by itself.
public struct PieceTable: Sendable {
    private let pieces: [[UInt8]]

    public init(contentsOf file: URL) throws {
        do {
            try self.init(json: Data(contentsOf: file))
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
    }

    init(json: Data) throws {
        pieces = try JSONDecoder().decode([Piece].self, from: json).map(\.bytes)
    }

    /// Ids past the end, as in a padded vocabulary, stand for nothing.
    public func bytes(of token: Int) -> [UInt8] {
        pieces.indices.contains(token) ? pieces[token] : []
    }

    private struct Piece: Decodable {
        let bytes: [UInt8]

        init(from decoder: any Swift.Decoder) throws {
            let entry = try decoder.singleValueContainer()
            if let text = try? entry.decode(String.self) {
                bytes = Array(text.utf8)
            } else {
                bytes = try entry.decode([UInt8].self)
            }
        }
    }
}
