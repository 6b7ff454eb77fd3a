#if canImport(Tokenizers)
import Foundation
import Tokenizers

/// The tokenizer beside the package, encoding with swift-transformers 1.3.3 or newer.
public struct HubTokenizer: TTTTokenizer {
    private let tokenizer: any Tokenizers.Tokenizer
    private let pieces: PieceTable

    /// - Parameter folder: with `config.json`, `tokenizer.json`, `tokenizer_config.json` and `pieces.json`.
    public init(folder: URL) async throws {
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        pieces = try PieceTable(contentsOf: folder.appendingPathComponent("pieces.json"))
    }

    public func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
        tokenizer.encode(text: text, addSpecialTokens: addingSpecialTokens)
    }

    public func bytes(of token: Int) -> [UInt8] {
        pieces.bytes(of: token)
    }
}
#endif
