/// The arrays in which `main` of a Core AI bundle keeps a state: each holds some parts of a `StateLayout`, one below
/// the other, [layers, H, rows, D]. `mlx_ttt/export/coreai/state.py` is where this comes from.
package struct StateGroups: Sendable, Equatable {
    package struct Group: Sendable, Equatable {
        package let name: String
        /// [layers, H, rows, D]
        package let shape: [Int]
        /// For each of the rows, which row of the packed state it is.
        fileprivate let packedRows: [Int]

        package var count: Int { shape.reduce(1, *) }
    }

    package let groups: [Group]
    private let layout: StateLayout

    /// - Parameter description: the entry `com.mlx-ttt.state` of a bundle, which `layout` was made from too.
    /// - Throws: `TTTError.notATTTPackage` if its groups do not hold every part once.
    package init(_ description: JSON, layout: StateLayout) throws {
        let damage = TTTError.notATTTPackage("com.mlx-ttt.state describes no groups")
        guard let members = description["groups"]?.members,
            members.reduce(0, { $0 + ($1.value.array?.count ?? 0) }) == layout.extents.count
        else { throw damage }
        groups = try members.map { group in
            let rows = try (group.value.array ?? []).flatMap { part in
                guard let rows = part.string.flatMap({ layout.extents[$0] }) else { throw damage }
                return Array(rows)
            }
            return Group(
                name: group.key, shape: [layout.layers, layout.heads, rows.count, layout.headDim], packedRows: rows)
        }
        guard groups.flatMap(\.packedRows).sorted() == Array(0..<layout.shape[2]) else { throw damage }
        self.layout = layout
    }

    /// The arrays of a packed state, [layers, H, R, width], by name.
    package func apart(_ packed: [Float]) -> [String: [Float]] {
        precondition(packed.count == layout.count)
        let pairs = groups.map { group in
            let values = places(of: group).flatMap { packed[$0..<$0 + layout.headDim] }
            return (group.name, values)
        }
        return Dictionary(uniqueKeysWithValues: pairs)
    }

    /// The inverse of `apart`.
    ///
    /// - Precondition: every array is there and has the shape of its group.
    package func together(_ arrays: [String: [Float]]) -> [Float] {
        var packed = [Float](repeating: 0, count: layout.count)
        for group in groups {
            let values = arrays[group.name] ?? []
            precondition(values.count == group.count)
            for (row, place) in places(of: group).enumerated() {
                let own = values[row * layout.headDim..<(row + 1) * layout.headDim]
                packed.replaceSubrange(place..<place + layout.headDim, with: own)
            }
        }
        return packed
    }

    /// Where each row of a group begins in the packed state.
    private func places(of group: Group) -> [Int] {
        let (R, width) = (layout.shape[2], layout.shape[3])
        return (0..<layout.layers * layout.heads).flatMap { head in group.packedRows.map { (head * R + $0) * width } }
    }
}
