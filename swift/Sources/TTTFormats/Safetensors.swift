import Foundation

/// A safetensors file: arrays by name, and texts by key.
package struct Safetensors: Sendable {
    package let metadata: [String: String]
    private let entries: [String: Entry]
    private let body: Data
    private let file: String

    private struct Entry {
        let type: String
        let shape: [Int]
        let bytes: Range<Int>
    }

    private static let sizes = ["F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U32": 4]
    private static let longestHeader = 100_000_000

    /// - Throws: `TTTError.unreadableFile` if there is no such file or it is damaged.
    package init(contentsOf file: URL) throws {
        let data: Data
        do {
            data = try Data(contentsOf: file, options: .mappedIfSafe)
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
        do {
            try self.init(data, file: file.lastPathComponent)
        } catch TTTError.damaged(let what) {
            throw TTTError.unreadableFile(file.lastPathComponent, what)
        }
    }

    /// - Throws: `TTTError.damaged`.
    package init(_ data: Data, file: String = "") throws {
        self.file = file
        guard data.count >= 8 else { throw TTTError.damaged("it is too short for safetensors") }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(Self.longestHeader), length <= UInt64(data.count - 8) else {
            throw TTTError.damaged("its header is longer than the file")
        }
        let rest = data.dropFirst(8)
        body = rest.dropFirst(Int(length))
        guard let members = try JSON(rest.prefix(Int(length))).members else {
            throw TTTError.damaged("its header is no object")
        }
        var metadata: [String: String] = [:]
        var entries: [String: Entry] = [:]
        for member in members {
            if member.key == "__metadata__" {
                for text in member.value.members ?? [] { metadata[text.key] = text.value.string }
            } else {
                entries[member.key] = try Self.entry(member, within: body.count)
            }
        }
        (self.metadata, self.entries) = (metadata, entries)
    }

    private static func entry(_ member: JSON.Member, within count: Int) throws -> Entry {
        let damage = TTTError.damaged("\(member.key) is described wrongly")
        guard let type = member.value["dtype"]?.string,
            let shape = member.value["shape"]?.array?.map(\.int), let size = sizes[type],
            let offsets = member.value["data_offsets"]?.array?.map(\.int), offsets.count == 2,
            let start = offsets[0], let end = offsets[1], 0 <= start, start <= end, end <= count
        else { throw damage }
        var bytes = size
        for dimension in shape {
            guard let dimension, dimension >= 0 else { throw damage }
            let (product, overflow) = bytes.multipliedReportingOverflow(by: dimension)
            guard !overflow else { throw damage }
            bytes = product
        }
        guard bytes == end - start else { throw damage }
        return Entry(type: type, shape: shape.compactMap { $0 }, bytes: start..<end)
    }

    package var names: [String] {
        entries.keys.sorted()
    }

    package func shape(of name: String) -> [Int]? {
        entries[name]?.shape
    }

    /// An array of floating point numbers, as float32.
    ///
    /// - Throws: `TTTError.unreadableFile` if there is none of that name, or its numbers are integers.
    package func tensor(_ name: String) throws -> Tensor {
        let entry = try self.entry(name)
        let values: [Float]
        switch entry.type {
        case "F32": values = scalars(entry, as: UInt32.self).map { Float(bitPattern: $0) }
        case "F16": values = scalars(entry, as: UInt16.self).map(Half.float)
        case "BF16": values = scalars(entry, as: UInt16.self).map { Float(bitPattern: UInt32($0) << 16) }
        default: throw TTTError.unreadableFile(file, "\(name) holds \(entry.type), expected floating point numbers")
        }
        return Tensor(shape: entry.shape, values: values)
    }

    /// An array of integers.
    package func integers(_ name: String) throws -> [Int] {
        let entry = try self.entry(name)
        switch entry.type {
        case "I32": return scalars(entry, as: Int32.self).map { Int($0) }
        case "I64": return scalars(entry, as: Int64.self).map { Int($0) }
        case "U32": return scalars(entry, as: UInt32.self).map { Int($0) }
        default: throw TTTError.unreadableFile(file, "\(name) holds \(entry.type), expected integers")
        }
    }

    private func entry(_ name: String) throws -> Entry {
        guard let entry = entries[name] else { throw TTTError.unreadableFile(file, "it has no \(name)") }
        return entry
    }

    private func scalars<Scalar: FixedWidthInteger>(_ entry: Entry, as type: Scalar.Type) -> [Scalar] {
        let size = MemoryLayout<Scalar>.size
        return body.withUnsafeBytes { bytes in
            (0..<entry.bytes.count / size).map { index in
                Scalar(littleEndian: bytes.loadUnaligned(fromByteOffset: entry.bytes.lowerBound + index * size, as: type))
            }
        }
    }
}

/// Puts arrays into a safetensors file.
package struct SafetensorsWriter {
    private var header: [String] = []
    private var body: [Data] = []
    private var count = 0

    package init(metadata: [String: String]) {
        let entries = metadata.sorted { $0.key < $1.key }.map { "\(quoted($0.key)):\(quoted($0.value))" }
        header.append("\"__metadata__\":{\(entries.joined(separator: ","))}")
    }

    /// - Parameter type: "F32", "I32" and so on.
    package mutating func add(_ name: String, type: String, shape: [Int], bytes: Data) {
        let offsets = [count, count + bytes.count]
        count += bytes.count
        header.append("\(quoted(name)):{\"dtype\":\"\(type)\",\"shape\":\(list(shape)),\"data_offsets\":\(list(offsets))}")
        body.append(bytes)
    }

    package func encoded() -> Data {
        var text = "{\(header.joined(separator: ","))}"
        while text.utf8.count % 8 > 0 { text += " " }  // readers map the numbers behind it
        var data = Data(capacity: 8 + text.utf8.count + count)
        for part in [littleEndian(UInt64(text.utf8.count)), Data(text.utf8)] + body { data.append(part) }
        return data
    }

    private func list(_ integers: [Int]) -> String {
        "[\(integers.map(String.init).joined(separator: ","))]"
    }
}

/// A text as JSON has it, in ASCII as Python writes it.
package func quoted(_ text: String) -> String {
    var result = "\""
    for unit in text.utf16 {
        switch unit {
        case 0x22: result += "\\\""
        case 0x5C: result += "\\\\"
        case 0x0A: result += "\\n"
        case 0x0D: result += "\\r"
        case 0x09: result += "\\t"
        case 0x08: result += "\\b"
        case 0x0C: result += "\\f"
        case 0x20..<0x7F: result.unicodeScalars.append(Unicode.Scalar(UInt8(unit)))
        default:
            let digits = String(unit, radix: 16)
            result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
        }
    }
    return result + "\""
}

package func littleEndian<Integer: FixedWidthInteger>(_ value: Integer) -> Data {
    withUnsafeBytes(of: value.littleEndian) { Data($0) }
}

/// Of IEEE numbers, which Swift's systems all have in this order already.
package func littleEndian(_ values: [Float]) -> Data {
    #if _endian(little)
    return values.withUnsafeBytes { Data($0) }
    #else
    return Data(values.flatMap { value in withUnsafeBytes(of: value.bitPattern.littleEndian) { Array($0) } })
    #endif
}
