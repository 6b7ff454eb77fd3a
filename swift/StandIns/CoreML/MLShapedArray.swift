import Foundation
import TTTFormats

public protocol MLShapedArrayScalar {}

extension Int32: MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public let scalars: [Scalar]
    public let shape: [Int]

    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {
        self.scalars = Array(scalars)
        self.shape = shape
        precondition(self.scalars.count == shape.reduce(1, *))
    }
}

extension MLShapedArray where Scalar == Float {
    public init(converting array: MLMultiArray) {
        let scalars: [Float] =
            switch array.dataType {
            case .float16: array.scalars(as: UInt16.self).map(Half.float)
            case .float32: array.scalars(as: UInt32.self).map { Float(bitPattern: $0) }
            case .int32: array.scalars(as: Int32.self).map { Float($0) }
            case .double: array.scalars(as: UInt64.self).map { Float(Double(bitPattern: $0)) }
            }
        self.init(scalars: scalars, shape: array.shape.map(\.intValue))
    }
}

extension MLMultiArray {
    public convenience init<Scalar>(_ shapedArray: MLShapedArray<Scalar>) {
        self.init(shape: shapedArray.shape, type: Scalar.self == Int32.self ? .int32 : .float32, gap: 0)
        if let integers = shapedArray.scalars as? [Int32] { fill(integers) }
        if let numbers = shapedArray.scalars as? [Float] { fill(numbers.map(\.bitPattern)) }
    }
}
