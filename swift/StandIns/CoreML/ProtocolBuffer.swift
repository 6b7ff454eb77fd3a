/// A message of protocol buffers: fields by number, as far as a package's description needs them.
struct ProtocolBuffer {
    private var integers: [Int: [UInt64]] = [:]
    private var floats: [Int: Float] = [:]
    private var bytes: [Int: [ArraySlice<UInt8>]] = [:]

    struct Damage: Error {}

    init(_ data: ArraySlice<UInt8>) throws {
        var rest = data
        while !rest.isEmpty {
            let key = try Self.integer(&rest)
            let field = Int(key >> 3)
            switch key & 7 {
            case 0: integers[field, default: []].append(try Self.integer(&rest))
            case 1: try Self.drop(8, from: &rest)
            case 2:
                let length = try Self.integer(&rest)
                guard length <= UInt64(rest.count) else { throw Damage() }
                bytes[field, default: []].append(rest.prefix(Int(length)))
                rest = rest.dropFirst(Int(length))
            case 5:
                let bits = rest.prefix(4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
                try Self.drop(4, from: &rest)
                floats[field] = Float(bitPattern: bits)
            default: throw Damage()
            }
        }
    }

    func messages(_ field: Int) throws -> [ProtocolBuffer] {
        try (bytes[field] ?? []).map { try ProtocolBuffer($0) }
    }

    func message(_ field: Int) throws -> ProtocolBuffer? {
        try messages(field).first
    }

    func text(_ field: Int) -> String {
        String(decoding: bytes[field]?.last ?? [], as: UTF8.self)
    }

    func integer(_ field: Int) -> Int? {
        integers[field]?.last.flatMap { Int(exactly: $0) }
    }

    func float(_ field: Int) -> Float? {
        floats[field]
    }

    /// Repeated integers, packed or not.
    func list(_ field: Int) throws -> [Int] {
        var list = (integers[field] ?? []).map { Int(truncatingIfNeeded: $0) }
        for var packed in bytes[field] ?? [] {
            while !packed.isEmpty { list.append(Int(truncatingIfNeeded: try Self.integer(&packed))) }
        }
        return list
    }

    private static func integer(_ rest: inout ArraySlice<UInt8>) throws -> UInt64 {
        var value: UInt64 = 0
        for shift in stride(from: UInt64(0), to: 64, by: 7) {
            guard let byte = rest.popFirst() else { throw Damage() }
            value |= UInt64(byte & 0x7F) << shift
            if byte < 0x80 { return value }
        }
        throw Damage()
    }

    private static func drop(_ count: Int, from rest: inout ArraySlice<UInt8>) throws {
        guard rest.count >= count else { throw Damage() }
        rest = rest.dropFirst(count)
    }
}
