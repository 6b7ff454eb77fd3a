import Foundation
import TTTFormats

/// The network of a model directory in plain Swift and float32, one token at a time.
///
/// It is made to be compared with, not to be fast. The update rule is that of `mlx_ttt/network/dual.py`.
package struct ReferenceNetwork: Sendable {
    package let configuration: ModelConfiguration
    private let embedding: Matrix
    private let head: Matrix
    private let norm: [Float]
    private let blocks: [Block]

    /// - Parameter directory: with `config.json` and `model*.safetensors`.
    /// - Throws: `TTTError.unreadableFile` or `.unsupported`.
    package init(directory: URL) throws {
        configuration = try ModelConfiguration(contentsOf: directory.appendingPathComponent("config.json"))
        let (V, C) = (configuration.vocabularySize, configuration.hiddenSize)
        let weights = try Weights(directory: directory)
        embedding = try weights.matrix("model.embed_tokens.weight", rows: V, columns: C)
        head = configuration.tiesEmbeddings ? embedding : try weights.matrix("lm_head.weight", rows: V, columns: C)
        norm = try weights.values("model.norm.weight", [C])
        let configuration = configuration
        blocks = try (0..<configuration.layers).map { try Block(weights, "model.layers.\($0).", configuration) }
    }

    /// The state before the first token.
    package var start: [LayerState] {
        blocks.map(\.start)
    }

    /// Reads one token.
    ///
    /// - Parameter state: one per layer; goes on.
    /// - Returns: the hidden state that `logits` takes, [C].
    /// - Throws: `TTTError.tokenOutsideVocabulary`.
    package func read(_ token: Int, _ state: inout [LayerState]) throws -> [Float] {
        guard (0..<configuration.vocabularySize).contains(token) else {
            throw TTTError.tokenOutsideVocabulary(token, size: configuration.vocabularySize)
        }
        var x = embedding.row(token)
        for (index, block) in blocks.enumerated() { x = block.read(x, &state[index]) }
        return rmsNorm(x, norm, epsilon: configuration.normEpsilon)
    }

    /// Logits of the next token, [V].
    package func logits(_ hidden: [Float]) -> [Float] {
        head(hidden)
    }
}
