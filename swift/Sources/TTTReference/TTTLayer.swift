import TTTFormats

/// A TTT layer. Its hidden state is an inner model for each head, trained on every token.
struct TTTLayer: Sendable {
    private let configuration: ModelConfiguration
    private let query: Matrix
    private let value: Matrix
    private let output: Matrix
    private let key: Matrix?
    private let gate: Matrix?
    private let convolutions: (q: Convolution, k: Convolution)?
    private let rateWeight: Matrix  // [H, C]
    private let rateBias: [Float]  // [H]
    private let postNorm: (weight: [Float], bias: [Float])
    private let inner: InnerModels

    init(_ weights: Weights, _ prefix: String, _ configuration: ModelConfiguration) throws {
        let (C, H) = (configuration.hiddenSize, configuration.heads)
        func projection(_ name: String) throws -> Matrix {
            try weights.matrix("\(prefix)\(name)_proj.weight", rows: C, columns: C)
        }
        func convolution(_ name: String) throws -> Convolution {
            try Convolution(weights, prefix + name, channels: C, kernel: configuration.convKernel)
        }
        self.configuration = configuration
        (query, value, output) = (try projection("q"), try projection("v"), try projection("o"))
        let shares = configuration.sharesQueriesAndKeys
        key = shares ? nil : try projection("k")
        convolutions = shares ? (try convolution("conv_q"), try convolution("conv_k")) : nil
        gate = configuration.hasGate ? try projection("g") : nil
        rateWeight = try weights.matrix(prefix + "learnable_ttt_lr_weight", rows: H, columns: C)
        rateBias = try weights.values(prefix + "learnable_ttt_lr_bias", [H])
        postNorm = (
            try weights.values(prefix + "post_norm.weight", [C]), try weights.values(prefix + "post_norm.bias", [C])
        )
        inner = try InnerModels(weights, prefix, configuration)
    }

    /// The state before the first token.
    var start: LayerState {
        let kept = configuration.convKernel - 1
        let names = (configuration.hasConvolution ? ["conv"] : []) + (convolutions == nil ? [] : ["conv_qk"])
        var history: [String: Tensor] = [:]
        for name in names where kept > 0 { history[name] = Tensor(zeros: [1, kept, configuration.hiddenSize]) }
        return LayerState(
            offset: 0, weights: inner.startWeights, rows: inner.emptyRows(heads: configuration.heads), history: history)
    }

    /// x [C] of one token -> [C]; and what each head did with it.
    ///
    /// - Parameter learning: what the learning rates are multiplied by, [H]; nil: nothing.
    func read(
        _ x: [Float], _ state: inout LayerState, learning: [Float]?
    ) -> (output: [Float], signals: [HeadSignals]) {
        let D = configuration.headDim
        let (q, k) = queryAndKey(x, &state)
        let v = value(x)
        var rates = zip(rateWeight(x), rateBias).map {
            Float(configuration.baseLearningRate / Double(D)) * sigmoid($0 + $1)
        }
        if let learning { rates = zip(rates, learning).map { $0 * $1 } }
        let position = state.offset % configuration.miniBatchSize
        var y: [Float] = []
        var signals: [HeadSignals] = []
        for head in 0..<configuration.heads {
            func turned(_ x: [Float]) -> [Float] {
                rotated(Array(x[head * D..<(head + 1) * D]), position: position, theta: configuration.ropeTheta)
            }
            let (output, seen) = inner.read(
                head: head, query: turned(q), key: turned(k), value: Array(v[head * D..<(head + 1) * D]),
                learningRate: rates[head], state: &state)
            y += output
            signals.append(seen)
        }
        state.offset += 1
        y = layerNorm(y, postNorm.weight[...], postNorm.bias[...])
        if let gate { y = zip(gate(x), y).map { geluAndSlope($0).y * $1 } }
        return (output(y), signals)
    }

    private func queryAndKey(_ x: [Float], _ state: inout LayerState) -> ([Float], [Float]) {
        if let key { return (query(x), key(x)) }
        guard let convolutions else { return (query(x), query(x)) }
        let inputs = state.withHistory("conv_qk", query(x))
        return (convolutions.q(inputs), convolutions.k(inputs))
    }
}
