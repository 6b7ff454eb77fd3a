import TTTFormats

/// Not `Sendable`: whether Core AI's is, its documentation does not say.
public struct NDArray {
    public enum ScalarType: Hashable, Sendable {
        case float16, float32, int32

        var size: Int { self == .float16 ? 2 : 4 }

        init?(name: String?) {
            switch name {
            case "float16": self = .float16
            case "float32": self = .float32
            case "int32": self = .int32
            default: return nil
            }
        }

        func isOf<T>(_ type: T.Type) -> Bool {
            switch self {
            case .float16: T.self == Float16.self
            case .float32: T.self == Float.self
            case .int32: T.self == Int32.self
            }
        }
    }

    final class Storage {
        let memory: UnsafeMutableRawBufferPointer

        init(byteCount: Int) {
            memory = .allocate(byteCount: byteCount, alignment: 64)
            memory.initializeMemory(as: UInt8.self, repeating: 0xFF)  // nobody may count on zeros
        }

        convenience init(copying other: Storage) {
            self.init(byteCount: other.memory.count)
            StandIn.shared.countCopy()
            memory.copyMemory(from: UnsafeRawBufferPointer(other.memory))
        }

        deinit { memory.deallocate() }
    }

    public let shape: [Int]
    public let scalarType: ScalarType
    public let strides: [Int]
    private(set) var storage: Storage

    public init(shape: [Int], scalarType: ScalarType) {
        self.init(shape: shape, scalarType: scalarType, gap: 0)
    }

    /// - Parameter gap: unused scalars behind each row, as a device may want them.
    init(shape: [Int], scalarType: ScalarType, gap: Int) {
        var strides: [Int] = []
        var step = 1
        for (index, size) in shape.enumerated().reversed() {
            strides.insert(step, at: 0)
            step *= size
            if index == shape.count - 1 { step += gap }
        }
        (self.shape, self.scalarType, self.strides) = (shape, scalarType, strides)
        storage = Storage(byteCount: max(step, 1) * scalarType.size)
    }

    public init(descriptor: consuming NDArrayDescriptor) {
        precondition(!descriptor.shape.contains { $0 < 0 }, "a dynamic dimension is left")
        self.init(shape: descriptor.shape, scalarType: descriptor.scalarType, gap: 32)
    }

    public init<Scalar: BitwiseCopyable>(scalars: some Sequence<Scalar>, shape: [Int]) {
        let type: ScalarType = Scalar.self == Int32.self ? .int32 : Scalar.self == Float.self ? .float32 : .float16
        self.init(shape: shape, scalarType: type)
        precondition(type.isOf(Scalar.self))
        let scalars = Array(scalars)
        precondition(scalars.count == shape.reduce(1, *))
        let memory = storage.memory.bindMemory(to: Scalar.self)
        for (index, scalar) in scalars.enumerated() { memory[index] = scalar }
    }

    public struct View<Element: BitwiseCopyable>: ~Copyable, ~Escapable {
        private let array: NDArray

        @_lifetime(borrow array)
        init(_ array: borrowing NDArray) {
            self.array = copy array
        }

        public func withUnsafePointer<R, E: Error>(
            _ body: (UnsafePointer<Element>, Span<Int>, Span<Int>) throws(E) -> R
        ) throws(E) -> R {
            let memory = array.storage.memory.bindMemory(to: Element.self)
            guard let start = memory.baseAddress else { preconditionFailure("an array without memory") }
            return try body(UnsafePointer(start), array.shape.span, array.strides.span)
        }
    }

    public struct MutableView<Element: BitwiseCopyable>: ~Copyable, ~Escapable {
        private let array: NDArray

        @_lifetime(borrow array)
        init(_ array: borrowing NDArray) {
            self.array = copy array
        }

        public func withUnsafeMutablePointer<R, E: Error>(
            _ body: (UnsafeMutablePointer<Element>, Span<Int>, Span<Int>) throws(E) -> R
        ) throws(E) -> R {
            let memory = array.storage.memory.bindMemory(to: Element.self)
            guard let start = memory.baseAddress else { preconditionFailure("an array without memory") }
            return try body(start, array.shape.span, array.strides.span)
        }
    }

    @_lifetime(borrow self)
    public func view<T: BitwiseCopyable>(as type: T.Type = T.self) -> View<T> {
        precondition(scalarType.isOf(type), "a view as \(type) of \(scalarType)")
        return View(self)
    }

    @_lifetime(&self)
    public mutating func mutableView<T: BitwiseCopyable>(as type: T.Type = T.self) -> MutableView<T> {
        precondition(scalarType.isOf(type), "a view as \(type) of \(scalarType)")
        makeUnique()
        return MutableView(self)
    }

    mutating func makeUnique() {
        if !isKnownUniquelyReferenced(&storage) { storage = Storage(copying: storage) }
    }

    // MARK: - For the stand-in alone

    private var places: [Int] {
        zip(shape, strides).reduce([0]) { places, dimension in
            places.flatMap { start in (0..<dimension.0).map { start + $0 * dimension.1 } }
        }
    }

    func scalars<Scalar: BitwiseCopyable>(as type: Scalar.Type) -> [Scalar] {
        let memory = storage.memory.bindMemory(to: Scalar.self)
        return places.map { memory[$0] }
    }

    /// Writes through, whoever else holds the memory: what a view is for.
    func fill<Scalar: BitwiseCopyable>(_ scalars: [Scalar]) {
        let memory = storage.memory.bindMemory(to: Scalar.self)
        for (place, scalar) in zip(places, scalars) { memory[place] = scalar }
    }

    var numbers: [Float] {
        scalarType == .float16 ? scalars(as: UInt16.self).map(Half.float) : scalars(as: Float.self)
    }

    func fill(numbers: [Float]) {
        if scalarType == .float16 { fill(numbers.map(Half.bits)) } else { fill(numbers) }
    }
}

public struct NDArrayDescriptor: Sendable {
    /// -1 in dimensions that the caller chooses.
    public let shape: [Int]
    public let scalarType: NDArray.ScalarType

    public func resolvingDynamicDimensions(_ newShape: [Int]) -> NDArrayDescriptor {
        NDArrayDescriptor(shape: newShape, scalarType: scalarType)
    }
}
