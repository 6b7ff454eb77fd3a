import TTTFormats

/// A causal depthwise convolution over time.
struct Convolution: Sendable {
    private let taps: [Float]  // [C, kernel]
    private let bias: [Float]  // [C]
    private let kernel: Int

    init(_ weights: Weights, _ name: String, channels: Int, kernel: Int) throws {
        taps = try weights.values(name + ".weight", [channels, kernel])
        bias = try weights.values(name + ".bias", [channels])
        self.kernel = kernel
    }

    /// - Parameter inputs: the present one behind the kernel - 1 before it, [kernel · C].
    func callAsFunction(_ inputs: [Float]) -> [Float] {
        let channels = bias.count
        return (0..<channels).map { c in
            (0..<kernel).reduce(bias[c]) { $0 + inputs[$1 * channels + c] * taps[c * kernel + $1] }
        }
    }
}

extension LayerState {
    /// x [C] behind the inputs before it, [kernel · C]. Remembers the last ones for the next call.
    mutating func withHistory(_ name: String, _ x: [Float]) -> [Float] {
        let inputs = (history[name]?.values ?? []) + x
        history[name]?.values = Array(inputs.dropFirst(x.count))
        return inputs
    }
}
