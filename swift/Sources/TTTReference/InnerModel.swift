import TTTFormats

/// What one head does with a token; see `TTTSignals`.
struct HeadSignals: Sendable {
    let loss: Float
    let learningRate: Float
    let writeNorm: Float
}

/// The inner models of a layer, and how they are trained on one token (the dual form with one token at a time).
///
/// Shapes: H heads, D head dimension, K mini-batch size.
struct InnerModels: Sendable {
    /// Where a map's input and error are in a row, and its widths.
    private struct Map {
        let inputs: Int
        let outputs: Int
        let x: Int
        let e: Int
    }

    private let maps: [Map]
    private let headDim: Int
    private let rowWidth: Int
    private let factors: [Float]  // t, [K]
    private let gamma: [Float]  // [H, D]
    private let beta: [Float]  // [H, D]
    let startWeights: [Tensor]

    init(_ weights: Weights, _ prefix: String, _ configuration: ModelConfiguration) throws {
        let (H, D, K) = (configuration.heads, configuration.headDim, configuration.miniBatchSize)
        let widths = configuration.innerModel == .linear ? [D, D] : [D, 4 * D, D]
        var maps: [Map] = []
        var at = 0
        var start: [Tensor] = []
        for (index, (inputs, outputs)) in zip(widths, widths.dropFirst()).enumerated() {
            maps.append(Map(inputs: inputs, outputs: outputs, x: at, e: at + inputs))
            at += inputs + outputs
            for (name, shape) in [("W", [H, inputs, outputs]), ("b", [H, 1, outputs])] {
                start.append(Tensor(shape: [1] + shape, values: try weights.values("\(prefix)\(name)\(index + 1)", shape)))
            }
        }
        (self.maps, headDim, rowWidth, startWeights) = (maps, D, at, start)
        let learned = try weights.values(prefix + "learnable_token_idx", [K])
        factors = learned.enumerated().map { max(1 / Float($0 + 1) + $1, 0) }
        gamma = try weights.values(prefix + "ttt_norm_weight", [H, D])
        beta = try weights.values(prefix + "ttt_norm_bias", [H, D])
    }

    func emptyRows(heads: Int) -> Tensor {
        Tensor(zeros: [1, heads, factors.count, rowWidth])
    }

    /// Has one head read the next token of the open mini-batch.
    ///
    /// - Parameters:
    ///   - query, key, value: [D].
    ///   - state: at the phase that its offset says. Its offset stays.
    /// - Returns: q + LN(f(q)), [D]; and what the head did with the token.
    func read(
        head: Int, query: [Float], key: [Float], value: [Float], learningRate: Float, state: inout LayerState
    ) -> (output: [Float], signals: HeadSignals) {
        let K = factors.count
        let phase = state.offset % K
        let (gamma, beta) = (gamma[head * headDim..<(head + 1) * headDim], beta[head * headDim..<(head + 1) * headDim])

        // Keys forward, errors backward.
        var inputs = [key]
        var slopes: [[Float]] = []
        var z = forward(0, head, key, state)
        for map in maps.indices.dropFirst() {
            let activations = z.map(geluAndSlope)
            inputs.append(activations.map(\.y))
            slopes.append(activations.map(\.slope))
            z = forward(map, head, inputs[map], state)
        }
        let aim = zip(value, key).map { $0 - $1 }
        let loss = squares(zip(layerNorm(z, gamma, beta), aim).map { $0 - $1 }) / 2
        var errors = [error(z, aim: aim, gamma, beta).map { $0 * learningRate }]
        for map in maps.indices.dropFirst().reversed() {
            errors.insert(zip(backward(map, head, errors[0], state), slopes[map - 1]).map { $0 * $1 }, at: 0)
        }

        let written = zip(inputs, errors).reduce(0) { $0 + (squares($1.0) + 1) * squares($1.1) }
        let signals = HeadSignals(
            loss: loss, learningRate: learningRate, writeNorm: factors[K - 1] * written.squareRoot())

        // The token's row.
        let rows = head * K * rowWidth
        for (map, (x, e)) in zip(maps, zip(inputs, errors)) {
            let row = rows + phase * rowWidth
            state.rows.values.replaceSubrange(row + map.x..<row + map.x + map.inputs, with: x)
            state.rows.values.replaceSubrange(row + map.e..<row + map.e + map.outputs, with: e)
        }

        // The query forward, through what has been learned up to here.
        var x = query
        for map in maps.indices {
            if map > 0 { x = z.map { geluAndSlope($0).y } }
            z = forward(map, head, x, state)
            addLearned(map, rows: rows, phase: phase, x, state, to: &z)
        }
        if phase == K - 1 { commit(head, rows: rows, &state) }
        return (zip(query, layerNorm(z, gamma, beta)).map { $0 + $1 }, signals)
    }

    /// ‖x‖²
    private func squares(_ x: [Float]) -> Float {
        x.reduce(0) { $0 + $1 * $1 }
    }

    /// x W + b
    private func forward(_ map: Int, _ head: Int, _ x: [Float], _ state: LayerState) -> [Float] {
        let (n, m) = (maps[map].inputs, maps[map].outputs)
        var z = Array(state.weights[2 * map + 1].values[head * m..<(head + 1) * m])
        state.weights[2 * map].values.withUnsafeBufferPointer { weights in
            z.withUnsafeMutableBufferPointer { z in
                guard let weights = weights.baseAddress, let z = z.baseAddress else { return }
                for i in 0..<n { add(x[i], weights + (head * n + i) * m, to: z, m) }
            }
        }
        return z
    }

    /// e Wᵀ
    private func backward(_ map: Int, _ head: Int, _ e: [Float], _ state: LayerState) -> [Float] {
        let (n, m) = (maps[map].inputs, maps[map].outputs)
        return state.weights[2 * map].values.withUnsafeBufferPointer { weights in
            e.withUnsafeBufferPointer { e in
                guard let weights = weights.baseAddress, let e = e.baseAddress else { return [] }
                return (0..<n).map { dot(weights + (head * n + $0) * m, e, m) }
            }
        }
    }

    /// The gradient of ½‖LN(z) - aim‖² with respect to z.
    private func error(
        _ z: [Float], aim: [Float], _ gamma: ArraySlice<Float>, _ beta: ArraySlice<Float>
    ) -> [Float] {
        let (normal, inverseDeviation) = standardized(z)
        let u = zip(zip(normal, aim), zip(gamma, beta)).map { $1.0 * ($1.0 * $0.0 + $1.1 - $0.1) }
        let mean = u.reduce(0, +) / Float(u.count)
        let projection = zip(u, normal).reduce(0) { $0 + $1.0 * $1.1 } / Float(u.count)
        return zip(u, normal).map { ($0 - mean - $1 * projection) * inverseDeviation }
    }

    /// z -= t Σ (x · x_j + 1) e_j over the rows of the open mini-batch.
    private func addLearned(
        _ map: Int, rows: Int, phase: Int, _ x: [Float], _ state: LayerState, to z: inout [Float]
    ) {
        let map = maps[map]
        state.rows.values.withUnsafeBufferPointer { all in
            x.withUnsafeBufferPointer { x in
                z.withUnsafeMutableBufferPointer { z in
                    guard let all = all.baseAddress, let x = x.baseAddress, let z = z.baseAddress else { return }
                    for slot in 0...phase {
                        let row = all + rows + slot * rowWidth
                        add(-factors[phase] * (dot(x, row + map.x, map.inputs) + 1), row + map.e, to: z, map.outputs)
                    }
                }
            }
        }
    }

    /// W - t Σ x_jᵀ e_j and b - t Σ e_j with the last t; the rows are cleared.
    private func commit(_ head: Int, rows: Int, _ state: inout LayerState) {
        let K = factors.count
        for (index, map) in maps.enumerated() {
            for slot in 0..<K {
                let row = rows + slot * rowWidth
                let e = Array(state.rows.values[row + map.e..<row + map.e + map.outputs])
                let x = Array(state.rows.values[row + map.x..<row + map.x + map.inputs])
                state.weights[2 * index].values.withUnsafeMutableBufferPointer { weights in
                    guard let weights = weights.baseAddress else { return }
                    for i in 0..<map.inputs {
                        add(-factors[K - 1] * x[i], e, to: weights + (head * map.inputs + i) * map.outputs, map.outputs)
                    }
                }
                state.weights[2 * index + 1].values.withUnsafeMutableBufferPointer { bias in
                    guard let bias = bias.baseAddress else { return }
                    add(-factors[K - 1], e, to: bias + head * map.outputs, map.outputs)
                }
            }
        }
        state.rows.values.withUnsafeMutableBufferPointer { values in
            values[rows..<rows + K * rowWidth].update(repeating: 0)
        }
    }
}
