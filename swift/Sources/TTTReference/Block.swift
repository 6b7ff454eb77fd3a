import TTTFormats

/// Convolution, TTT layer and feed-forward network, each added to what it reads.
struct Block: Sendable {
    private let configuration: ModelConfiguration
    private let convolution: (norm: [Float], conv: Convolution)?
    private let layerNormWeight: [Float]
    private let layer: TTTLayer
    private let feedForwardNorm: [Float]
    private let gate: Matrix
    private let up: Matrix
    private let down: Matrix

    init(_ weights: Weights, _ prefix: String, _ configuration: ModelConfiguration) throws {
        let (C, wide) = (configuration.hiddenSize, configuration.intermediateSize)
        self.configuration = configuration
        convolution = configuration.hasConvolution
            ? (
                try weights.values(prefix + "conv.norm.weight", [C]),
                try Convolution(weights, prefix + "conv.conv", channels: C, kernel: configuration.convKernel)
            ) : nil
        layerNormWeight = try weights.values(prefix + "seq_norm.weight", [C])
        layer = try TTTLayer(weights, prefix + "seq_modeling_block.", configuration)
        feedForwardNorm = try weights.values(prefix + "ffn_norm.weight", [C])
        gate = try weights.matrix(prefix + "mlp.gate_proj.weight", rows: wide, columns: C)
        up = try weights.matrix(prefix + "mlp.up_proj.weight", rows: wide, columns: C)
        down = try weights.matrix(prefix + "mlp.down_proj.weight", rows: C, columns: wide)
    }

    var start: LayerState { layer.start }

    /// x [C] of one token -> [C]; see `TTTLayer.read`.
    func read(
        _ x: [Float], _ state: inout LayerState, learning: [Float]?
    ) -> (output: [Float], signals: [HeadSignals]) {
        var x = x
        if let (norm, conv) = convolution {
            x = plus(x, conv(state.withHistory("conv", rmsNorm(x, norm, epsilon: configuration.normEpsilon))))
        }
        let normed = rmsNorm(x, layerNormWeight, epsilon: configuration.normEpsilon)
        let (learned, signals) = layer.read(normed, &state, learning: learning)
        x = plus(x, learned)
        let y = rmsNorm(x, feedForwardNorm, epsilon: configuration.normEpsilon)
        return (plus(x, down(zip(gate(y), up(y)).map { $0 * sigmoid($0) * $1 })), signals)
    }

    private func plus(_ x: [Float], _ y: [Float]) -> [Float] {
        zip(x, y).map { $0 + $1 }
    }
}
