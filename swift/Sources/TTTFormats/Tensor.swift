/// Numbers in row-major order.
public struct Tensor: Sendable, Equatable {
    /// Their number along each dimension.
    public let shape: [Int]
    /// As many as the product of the shape.
    public var values: [Float]

    /// - Precondition: there are as many values as the shape says.
    public init(shape: [Int], values: [Float]) {
        precondition(shape.reduce(1, *) == values.count)
        self.shape = shape
        self.values = values
    }

    /// Zeros of a shape.
    public init(zeros shape: [Int]) {
        self.init(shape: shape, values: [Float](repeating: 0, count: shape.reduce(1, *)))
    }
}
