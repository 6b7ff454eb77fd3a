import Foundation

public enum MLMultiArrayDataType: Int, Sendable {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104

    var size: Int {
        switch self {
        case .double: 8
        case .float32, .int32: 4
        case .float16: 2
        }
    }
}

public class MLMultiArray: NSObject {
    public let dataType: MLMultiArrayDataType
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    private let memory: UnsafeMutableRawBufferPointer

    public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        self.init(shape: shape.map(\.intValue), type: dataType, gap: 0)
    }

    /// - Parameter gap: scalars of unused memory behind each row, as Core ML leaves them to align rows.
    init(shape: [Int], type: MLMultiArrayDataType, gap: Int) {
        var strides: [Int] = []
        var step = 1
        for (index, size) in shape.enumerated().reversed() {
            strides.insert(step, at: 0)
            step *= size
            if index == shape.count - 1 { step += gap }
        }
        self.shape = shape.map { NSNumber(value: $0) }
        self.strides = strides.map { NSNumber(value: $0) }
        dataType = type
        memory = .allocate(byteCount: step * type.size, alignment: 64)
        memory.initializeMemory(as: UInt8.self, repeating: 0xFF)  // nobody may count on zeros
    }

    deinit {
        memory.deallocate()
    }

    public var count: Int {
        shape.reduce(1) { $0 * $1.intValue }
    }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(memory))
    }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        try body(memory, strides.map(\.intValue))
    }

    /// Where each scalar is in memory, in scalars, in row-major order.
    private lazy var places: [Int] = {
        var places = [0]
        for (size, stride) in zip(shape.map(\.intValue), strides.map(\.intValue)) {
            places = places.flatMap { start in (0..<size).map { start + $0 * stride } }
        }
        return places
    }()

    func scalars<Scalar: FixedWidthInteger>(as type: Scalar.Type) -> [Scalar] {
        let memory = self.memory.bindMemory(to: Scalar.self)
        return places.map { memory[$0] }
    }

    func fill<Scalar: FixedWidthInteger>(_ scalars: [Scalar]) {
        let memory = self.memory.bindMemory(to: Scalar.self)
        for (place, scalar) in zip(places, scalars) { memory[place] = scalar }
    }
}
