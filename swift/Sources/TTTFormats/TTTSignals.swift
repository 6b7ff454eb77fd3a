/// What each layer and head does with one token: [layers, heads] each. `mlx_ttt.observe` gives the same.
public struct TTTSignals: Sendable, Equatable {
    /// ½‖LN(f(k)) - (v - k)‖²: how badly the inner model, as it was at the start of the mini-batch, knew the token.
    public let loss: Tensor
    /// The inner learning rate, the learning scale included.
    public let learningRate: Tensor
    /// The norm of what the token adds to the inner weights when its mini-batch is complete.
    public let writeNorm: Tensor

    /// For models of one's own; see the properties for the shapes.
    public init(loss: Tensor, learningRate: Tensor, writeNorm: Tensor) {
        self.loss = loss
        self.learningRate = learningRate
        self.writeNorm = writeNorm
    }
}
