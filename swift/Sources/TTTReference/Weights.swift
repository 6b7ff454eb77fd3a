import Foundation
import TTTFormats

/// The arrays of a model directory by their official names.
struct Weights {
    private let files: [Safetensors]

    /// - Throws: `TTTError.unreadableFile` or `.unsupported`.
    init(directory: URL) throws {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: directory.path)) ?? []
        let weights = names.filter { $0.hasPrefix("model") && $0.hasSuffix(".safetensors") }.sorted()
        guard !weights.isEmpty else { throw TTTError.unreadableFile("model.safetensors", "there is none") }
        files = try weights.map { try Safetensors(contentsOf: directory.appendingPathComponent($0)) }
        if files.contains(where: { $0.names.contains { $0.hasSuffix(".scales") } }) {
            throw TTTError.unsupported(
                "The model directory is quantized; take the one that it was made from, which has the whole weights")
        }
    }

    /// Sorted.
    var names: [String] {
        files.flatMap(\.names).sorted()
    }

    func values(_ name: String) throws -> [Float] {
        guard let file = files.first(where: { $0.shape(of: name) != nil }) else {
            throw TTTError.unreadableFile("model.safetensors", "it has no \(name)")
        }
        return try file.tensor(name).values
    }

    /// - Parameter shape: what it must have; a dimension of 1 more or less does not count.
    func values(_ name: String, _ shape: [Int]) throws -> [Float] {
        guard let file = files.first(where: { $0.shape(of: name) != nil }) else {
            throw TTTError.unreadableFile("model.safetensors", "it has no \(name)")
        }
        let tensor = try file.tensor(name)
        guard tensor.shape.filter({ $0 != 1 }) == shape.filter({ $0 != 1 }) else {
            throw TTTError.unreadableFile("model.safetensors", "\(name) is \(tensor.shape), expected \(shape)")
        }
        return tensor.values
    }

    func matrix(_ name: String, rows: Int, columns: Int) throws -> Matrix {
        Matrix(rows: rows, columns: columns, values: try values(name, [rows, columns]))
    }
}
