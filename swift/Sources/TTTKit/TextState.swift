import Foundation
import TTTFormats

/// What has been read of a text. It can be continued many times, and saved to a file that Python reads too.
public struct TextState: Sendable, Equatable {
    /// The model's state after all tokens but the last, one per layer.
    public var layers: [LayerState]
    /// The last few tokens of the text. The very last one is still unread. Empty before the first token.
    public var tokens: [Int]
    /// What was given to read after those, and was not read because reading was cancelled. Python knows none.
    public var pending: [Int]
    /// Of the configuration, weights and tokenizer of the model directory that the state belongs to.
    public var fingerprint: String
    /// How the weights of the package were stored that made the state; nil if Python made it.
    public var weights: String?

    /// Tokens that the model has read.
    public var position: Int { layers.first?.offset ?? 0 }
}

extension TextState {
    /// Reads a file that `TTTGenerator.save` or Python's `mlx_ttt.save_state` wrote.
    ///
    /// - Throws: `TTTError.unreadableFile`, `.notAState`, `.damagedState` or `.unsupported`.
    public init(contentsOf file: URL) throws {
        let data: Data
        do {
            data = try Data(contentsOf: file)
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
        self = try StateFile.decoded(data)
    }
}
