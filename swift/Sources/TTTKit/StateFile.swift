import Foundation
import TTTFormats

/// The files that `mlx_ttt.save_state` writes and `mlx_ttt.load_state` reads: safetensors, as mlx-lm lays out its
/// prompt caches.
enum StateFile {
    private static let version = "1"

    static func encoded(_ state: TextState) -> Data {
        let tokens = "[\(state.tokens.map(String.init).joined(separator: ", "))]"
        var arrays: [Array] = []
        for (index, layer) in state.layers.enumerated() {
            arrays.append(Array("\(index).offset.0", [], .integer(Int32(clamping: layer.offset))))
            arrays += layer.weights.enumerated().map { Array("\(index).weights.\($0)", $1.shape, .numbers($1.values)) }
            arrays.append(Array("\(index).rows", layer.rows.shape, .numbers(layer.rows.values)))
            arrays += layer.history.map { Array("\(index).history.\($0)", $1.shape, .numbers($1.values)) }
        }
        arrays.sort { $0.name < $1.name }
        var metadata = [
            "0.mlx_ttt": version, "0.tokens": tokens, "0.fingerprint": state.fingerprint,
            "0.digest": digest(arrays, text: tokens), "2.0": "",
        ]
        for index in state.layers.indices {  // what mlx-lm says of each cache
            metadata["1.\(index)"] = "TTTCache"
            metadata["2.\(index + 1).0"] = "\(index).offset.0"
            metadata["2.\(index + 1).1"] = "scalar"
        }
        if let weights = state.weights { metadata["0.weights"] = weights }
        if !state.pending.isEmpty {
            metadata["0.pending"] = "[\(state.pending.map(String.init).joined(separator: ", "))]"
        }
        var writer = SafetensorsWriter(metadata: metadata)
        for array in arrays {
            writer.add(array.name, type: array.type, shape: array.shape, bytes: array.bytes)
        }
        return writer.encoded()
    }

    /// - Throws: `TTTError.notAState`, `.damagedState`, or `.unsupported` for a state of a kind that is not known here.
    static func decoded(_ data: Data) throws -> TextState {
        guard let file = try? Safetensors(data) else { throw TTTError.notAState }
        let metadata = file.metadata
        guard let version = metadata["0.mlx_ttt"] else { throw TTTError.notAState }
        guard ["1", "2"].contains(version) else {
            throw TTTError.unsupported("The state was saved by a newer version of mlx-ttt; update the Swift package")
        }
        guard version == self.version else {
            throw TTTError.unsupported(
                "The state is frozen, learns at another rate, or can take tokens back, which is not known here; save "
                    + "it without that")
        }
        do {
            let (arrays, layers) = try layers(of: file)
            guard let tokens = metadata["0.tokens"], let fingerprint = metadata["0.fingerprint"],
                digest(arrays, text: tokens) == metadata["0.digest"]
            else { throw TTTError.damagedState }
            return TextState(
                layers: layers, tokens: try integers(tokens), pending: try integers(metadata["0.pending"] ?? "[]"),
                fingerprint: fingerprint, weights: metadata["0.weights"])
        } catch TTTError.unreadableFile, TTTError.damaged {
            throw TTTError.damagedState
        }
    }

    private static func integers(_ text: String) throws -> [Int] {
        guard let list = try JSON(text.utf8).array else { throw TTTError.damagedState }
        return try list.map { item in
            guard let token = item.int, token >= 0 else { throw TTTError.damagedState }
            return token
        }
    }

    private static func layers(of file: Safetensors) throws -> ([Array], [LayerState]) {
        var arrays: [Array] = []
        var layers: [LayerState] = []
        func tensor(_ name: String) throws -> Tensor {
            let tensor = try file.tensor(name)
            arrays.append(Array(name, tensor.shape, .numbers(tensor.values)))
            return tensor
        }
        while file.shape(of: "\(layers.count).rows") != nil {
            let prefix = "\(layers.count)."
            let offset = try file.integers("\(prefix)offset.0")
            guard offset.count == 1, (0...Int(Int32.max)).contains(offset[0]),
                file.shape(of: "\(prefix)offset.0") == []
            else { throw TTTError.damagedState }
            arrays.append(Array("\(prefix)offset.0", [], .integer(Int32(offset[0]))))
            var weights: [Tensor] = []
            while file.shape(of: "\(prefix)weights.\(weights.count)") != nil {
                weights.append(try tensor("\(prefix)weights.\(weights.count)"))
            }
            var history: [String: Tensor] = [:]
            for name in file.names where name.hasPrefix("\(prefix)history.") {
                history[String(name.dropFirst("\(prefix)history.".count))] = try tensor(name)
            }
            layers.append(
                LayerState(offset: offset[0], weights: weights, rows: try tensor("\(prefix)rows"), history: history))
        }
        guard !layers.isEmpty, Set(layers.map(\.offset)).count == 1, arrays.count == file.names.count else {
            throw TTTError.damagedState
        }
        arrays.sort { $0.name < $1.name }
        return (arrays, layers)
    }

    /// Of names, shapes and values, as `mlx_ttt/text/state.py` makes it.
    private static func digest(_ arrays: [Array], text: String) -> String {
        var hash = SHA256()
        hash.update(text.utf8)
        for array in arrays {
            hash.update("\(array.name) \(array.shapeInPython) mlx.core.\(array.typeInPython)".utf8)
            hash.update(array.bytes)
        }
        return hash.hexDigest()
    }

    private struct Array {
        enum Content {
            case integer(Int32)
            case numbers([Float])
        }

        let name: String
        let shape: [Int]
        let content: Content
        let bytes: Data

        init(_ name: String, _ shape: [Int], _ content: Content) {
            self.name = name
            self.shape = shape
            self.content = content
            switch content {
            case .integer(let value): bytes = littleEndian(value)
            case .numbers(let values): bytes = littleEndian(values)
            }
        }

        var type: String {
            if case .integer = content { "I32" } else { "F32" }
        }

        var typeInPython: String {
            if case .integer = content { "int32" } else { "float32" }
        }

        var shapeInPython: String {
            "(\(shape.map(String.init).joined(separator: ", "))\(shape.count == 1 ? "," : ""))"
        }
    }
}
