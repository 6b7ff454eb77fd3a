import Foundation

/// A saved text: what the model's state is, and where in the text it stands.
///
/// "TTTSTAT1", the header's length (8 bytes), the header as JSON, the state, a checksum of all that (8 bytes);
/// integers are little-endian.
struct StateFile: Equatable {
    struct Header: Codable, Equatable {
        var fingerprint: String
        var position: Int
        var unread: [Int]
        var partialCharacter: [UInt8]
    }

    var header: Header
    var state: Data

    private static let magic = Data("TTTSTAT1".utf8)

    init(header: Header, state: Data) {
        self.header = header
        self.state = state
    }

    init(decoding file: Data) throws {
        guard file.prefix(8) == Self.magic else { throw TTTError.notAState }
        guard file.count >= 24 else { throw TTTError.damagedState }
        let body = Data(file.dropLast(8))
        let length = Self.integer(body.dropFirst(8).prefix(8))
        guard Self.integer(file.suffix(8)) == Self.checksum(body), length <= UInt64(body.count - 16),
            let header = try? JSONDecoder().decode(Header.self, from: Data(body.dropFirst(16).prefix(Int(length)))),
            header.position >= 0
        else { throw TTTError.damagedState }
        self.header = header
        state = Data(body.dropFirst(16 + Int(length)))
    }

    func encoded() throws -> Data {
        let json = try JSONEncoder().encode(header)
        var file = Self.magic
        file.append(Self.bytes(UInt64(json.count)))
        file.append(json)
        file.append(state)
        file.append(Self.bytes(Self.checksum(file)))
        return file
    }

    /// FNV-1a.
    private static func checksum(_ data: Data) -> UInt64 {
        data.withUnsafeBytes { bytes in
            bytes.reduce(UInt64(0xCBF2_9CE4_8422_2325)) { hash, byte in (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        }
    }

    private static func bytes(_ integer: UInt64) -> Data {
        Data((0..<8).map { UInt8(truncatingIfNeeded: integer >> (8 * UInt64($0))) })
    }

    private static func integer(_ bytes: Data) -> UInt64 {
        bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}
