/// What one layer remembers of a text. Shapes: H heads, D head dimension, K mini-batch size, C = H·D.
public struct LayerState: Sendable, Equatable {
    /// Tokens read.
    public var offset: Int
    /// Of the inner model at the start of the open mini-batch: (W1, b1) or (W1, b1, W2, b2), [1, H, ·, ·].
    public var weights: [Tensor]
    /// One row for each token of the open mini-batch, [1, H, K, R]; zero where there is none yet.
    public var rows: Tensor
    /// The last inputs of the causal convolutions by name, `conv` and `conv_qk`: [1, kernel - 1, C].
    public var history: [String: Tensor]

    /// For models of one's own; see the properties for the shapes.
    public init(offset: Int, weights: [Tensor], rows: Tensor, history: [String: Tensor]) {
        self.offset = offset
        self.weights = weights
        self.rows = rows
        self.history = history
    }

    /// Whether the other has the same arrays, of the same shapes.
    package func hasShape(of other: LayerState) -> Bool {
        weights.map(\.shape) == other.weights.map(\.shape) && rows.shape == other.rows.shape
            && history.mapValues(\.shape) == other.history.mapValues(\.shape)
    }
}
