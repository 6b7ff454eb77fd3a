import Foundation

public class MLState: NSObject {
    let arrays: [String: MLMultiArray]
    /// How many tokens of the open mini-batch are read; nil where somebody else has written the state.
    var phase: Int? = 0
    private let lock = NSLock()

    init(_ features: [PackageDescription.Feature]) {
        arrays = Dictionary(
            uniqueKeysWithValues: features.map { feature in
                let array = MLMultiArray(shape: feature.shape, type: feature.type, gap: 32)
                array.fill([UInt16](repeating: 0, count: array.count))
                return (feature.name, array)
            })
    }

    public func withMultiArray<R>(for stateName: String, _ body: (MLMultiArray) throws -> R) rethrows -> R {
        guard let array = arrays[stateName] else { preconditionFailure("no state \(stateName)") }
        let before = array.scalars(as: UInt16.self)
        defer { if array.scalars(as: UInt16.self) != before { phase = nil } }
        return try body(array)
    }

    /// Core ML allows one prediction at a time with a state.
    func alone<R>(_ body: () throws -> R) throws -> R {
        guard lock.try() else { throw StandInError("two predictions use one state at the same time") }
        defer { lock.unlock() }
        return try body()
    }
}
