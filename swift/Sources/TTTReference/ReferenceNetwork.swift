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
        try observe(token, &state).hidden
    }

    /// Reads one token, and shows what the layers did with it.
    ///
    /// - Parameters:
    ///   - state: one per layer; goes on.
    ///   - learning: what the learning rates are multiplied by, [layers, heads]; nil: nothing.
    /// - Throws: as `read`.
    package func observe(
        _ token: Int, _ state: inout [LayerState], learning: Tensor? = nil
    ) throws -> (hidden: [Float], signals: TTTSignals) {
        guard (0..<configuration.vocabularySize).contains(token) else {
            throw TTTError.tokenOutsideVocabulary(token, size: configuration.vocabularySize)
        }
        let H = configuration.heads
        var x = embedding.row(token)
        var seen: [HeadSignals] = []
        for (index, block) in blocks.enumerated() {
            let scale = learning.map { Array($0.values[index * H..<(index + 1) * H]) }
            let (output, signals) = block.read(x, &state[index], learning: scale)
            x = output
            seen += signals
        }
        func tensor(_ signal: (HeadSignals) -> Float) -> Tensor {
            Tensor(shape: [blocks.count, H], values: seen.map(signal))
        }
        let signals = TTTSignals(
            loss: tensor(\.loss), learningRate: tensor(\.learningRate), writeNorm: tensor(\.writeNorm))
        return (rmsNorm(x, norm, epsilon: configuration.normEpsilon), signals)
    }

    /// Logits of the next token, [V].
    package func logits(_ hidden: [Float]) -> [Float] {
        head(hidden)
    }
}
