public struct InferenceValue: ~Copyable {
    public enum Descriptor: Sendable {
        case ndArray(NDArrayDescriptor)
    }

    private let array: NDArray

    init(_ array: NDArray) {
        self.array = array
    }

    public var ndArray: NDArray? { array }
}
